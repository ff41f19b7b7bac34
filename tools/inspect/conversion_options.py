"""The options of `terrazzo explain --convert`, and the run that they ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from terrazzo._pictures import spread
from terrazzo.errors import InputError
from terrazzo.tools.files import check_output_file
from terrazzo.tools.mechanisms import Mechanism, read_mixer
from terrazzo.tools.options import UserPath

COUNT = 256

_OPTIONS = (
    click.option(
        "--convert",
        metavar="NAME[,KEY=VALUE...]",
        help="Measure on --pictures which attention layers this mixer replaces best.",
    ),
    click.option(
        "--pictures",
        "places",
        type=UserPath(),
        multiple=True,
        metavar="PLACE",
        help="With --convert: pictures, or folders of pictures; repeatable.",
    ),
    click.option(
        "--count",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"With --convert: use at most this many of the pictures [default: {COUNT}].",
    ),
    click.option("--checkpoint", type=UserPath(), metavar="FILE", help="With --convert: weights."),
    click.option("--pretrained", is_flag=True, help="With --convert: download the published weights."),
    click.option(
        "--num-classes", type=click.IntRange(min=1), metavar="N", help="With --convert: classes of the checkpoint."
    ),
    click.option(
        "--teacher",
        type=UserPath(),
        metavar="FILE",
        help="With --convert: weights before training, if training changed more than the mixers' own.",
    ),
    click.option(
        "--budget", type=click.IntRange(min=1), metavar="N", help="With --convert: choose at most this many layers."
    ),
    click.option(
        "--max-kl",
        type=click.FloatRange(min=0),
        metavar="X",
        help="With --convert: the largest KL of all chosen layers together.",
    ),
    click.option(
        "--save",
        type=UserPath(),
        metavar="FILE",
        help="With --convert and a limit: write the model with the chosen layers converted, as .pth or .safetensors.",
    ),
    click.option(
        "--greedy", is_flag=True, help="With --convert: try all remaining layers for each choice; this costs more."
    ),
)


@dataclass(frozen=True)
class Conversion:
    """What the options say; see their help."""

    convert: str
    places: Sequence[Path]
    count: int | None
    checkpoint: Path | None
    pretrained: bool
    num_classes: int | None
    teacher: Path | None
    budget: int | None
    max_kl: float | None
    save: Path | None
    greedy: bool

    def run(
        self,
        name: str,
        size: tuple[int, int] | None,
        batch: int,
        device: torch.device,
        dtype: str,
        backend: str,
        changes: Sequence[Mechanism],
        quiet: bool,
    ) -> dict[str, Any]:
        """Measure the plan, print it unless `quiet`, and return its facts.

        Raises:
            InputError: the model, the weights, the mixer, a limit or a picture is not valid.
        """
        from timm.data import resolve_model_data_config

        from terrazzo.backbones._convert import convert_attention
        from terrazzo.backbones._hosts import record_of
        from terrazzo.backbones._plan import conversion_plan
        from terrazzo.checkpoints.files import save_file
        from terrazzo.checkpoints.records import meta_of
        from terrazzo.kernels import use_backend
        from terrazzo.tools.console import progress
        from terrazzo.tools.data.pictures import find_pictures
        from terrazzo.tools.inspect import conversion
        from terrazzo.tools.inspect.trace import image_size, taking
        from terrazzo.tools.models import pretrained_cfg
        from terrazzo.tools.targets import load_timm_model

        if not self.places:
            raise InputError("--convert measures on pictures: name some, or a folder of them, with --pictures PLACE")
        if self.save is not None:
            if self.budget is None and self.max_kl is None:
                raise InputError("--save writes a model with the chosen layers: give a limit, --budget N or --max-kl X")
            if self.save.suffix not in (".pth", ".safetensors"):
                raise InputError(f"{self.save.name} ends in neither .safetensors nor .pth; name a file that does")
            check_output_file(self.save)
        mixer, options = read_mixer("--convert", self.convert)
        size = image_size(size or tuple(pretrained_cfg(name).input_size[1:]))
        if self.checkpoint is not None and not self.pretrained and not changes:
            model = conversion.load_student(name, self.checkpoint, size, self.num_classes)
        else:
            model = load_timm_model(name, self.checkpoint, self.pretrained, self.num_classes, size, changes)
        teacher = None
        if self.teacher is not None:
            teacher = load_timm_model(name, self.teacher, num_classes=self.num_classes, size=size)
            teacher = teacher.to(device, getattr(torch, dtype))
        model = model.to(device, getattr(torch, dtype))
        counts = conversion.savings(model, name, mixer, size, options)
        pictures = spread(find_pictures(self.places), self.count or COUNT)
        sweeps = (self.budget or len(counts["saved"])) if self.greedy else 2
        config = resolve_model_data_config(model)
        with progress("pictures", sweeps * len(pictures)) as bar, taking(name, size), use_backend(backend):
            images = conversion.Prepared(
                pictures, size, config, batch, lambda count: bar.advance(bar.task_ids[0], count)
            )
            limits = dict(budget=self.budget, max_kl=self.max_kl, greedy=self.greedy, teacher=teacher)
            plan = conversion_plan(model, mixer, images, **limits, **options)
        if self.checkpoint is None and not self.pretrained:
            click.echo(f"note: {name} has random weights; give weights with --checkpoint or --pretrained", err=True)
        facts = {"model": name, "input": [1, 3, *size], "dtype": dtype, "device": str(device)}
        facts |= {"changes": [change.name for change in changes]} | conversion.facts_of(plan, counts)
        if not quiet:
            conversion.print_plan(facts, plan, self.convert)
        if self.save is not None:
            convert_attention(model, mixer, plan, teacher=teacher, **options)
            self.save.parent.mkdir(parents=True, exist_ok=True)
            save_file({"state_dict": model.state_dict(), "meta": meta_of(record_of(model))}, self.save)
            click.echo(f"wrote {self.save}", err=quiet)
        return facts


def conversion_options(function: Callable) -> Callable:
    """Add the options of --convert to a verb, which gets `conversion`, a `Conversion` or None without --convert."""
    names = list(Conversion.__dataclass_fields__)

    def with_conversion(*args, **kwargs):
        found = {name: kwargs.pop(name) for name in names}
        needless = [key for key, value in found.items() if value not in (None, False, ())]
        if found["convert"] is None and needless:
            option = {"places": "pictures"}.get(needless[0], needless[0]).replace("_", "-")
            raise InputError(f"--{option} belongs to --convert NAME, which measures a conversion; name a mixer")
        conversion = None if found["convert"] is None else Conversion(**found)
        return function(*args, conversion=conversion, **kwargs)

    with_conversion.__doc__ = function.__doc__
    with_conversion.__click_params__ = getattr(function, "__click_params__", [])
    for decorate in reversed(_OPTIONS):
        with_conversion = decorate(with_conversion)
    return with_conversion

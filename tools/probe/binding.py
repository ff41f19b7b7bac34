"""`terrazzo probe binding`: whether the features of two positions say that both belong to one object."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from timm.data import resolve_model_data_config
from torch import nn

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.console import print_table
from terrazzo.tools.console import steps as steps_of
from terrazzo.tools.data.instances import read_instances
from terrazzo.tools.files import check_folder
from terrazzo.tools.mechanisms import DENSE, chosen, mechanism_options
from terrazzo.tools.options import UserPath, device_option, weights_options
from terrazzo.tools.probe.objects.collect import Cells, Grid, Key, Sampling, levels_of, of_model, of_pixels, of_place
from terrazzo.tools.probe.objects.effects import Effects
from terrazzo.tools.probe.objects.outcomes import RANDOM, TRAIN, Outcome, draw, rows_of, table
from terrazzo.tools.probe.objects.pictures import similarity
from terrazzo.tools.probe.objects.readouts import READOUTS, Sampled, Training, fit
from terrazzo.tools.probe.objects.scores import AUC, scores
from terrazzo.tools.targets import load_timm_model, pick_device

PLACE, PIXELS = "position alone", "pixels"
_DRAWN = 4


@click.command()
@click.argument("model")
@weights_options
@click.option(
    "--data-root",
    type=UserPath(),
    required=True,
    metavar="DIR",
    help="images/{train,val} and annotations/instances_{train,val}.json in COCO's format.",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    nargs=2,
    default=(448, 448),
    show_default=True,
    metavar="H W",
    help="Size of the images, cut from the middle of the pictures.",
)
@click.option(
    "--readout",
    "readouts",
    type=click.Choice(list(READOUTS)),
    multiple=True,
    default=("quad",),
    show_default=True,
    help="How a pair of positions is judged; repeatable.",
)
@click.option("--level", "levels", type=int, multiple=True, help="Blocks or stages, from 0; repeatable [default: all].")
@click.option(
    "--pairs",
    type=click.Choice(["objects", "all"]),
    default="objects",
    show_default=True,
    help="Both positions on objects, or anywhere; then the background counts as an object.",
)
@click.option("--positions", type=click.IntRange(min=2), default=64, show_default=True, help="Positions of a picture.")
@click.option("--count", type=click.IntRange(min=1), help="Use at most this many training pictures [default: all].")
@mechanism_options
@click.option("--ablate", type=int, metavar="LEVEL", help="Disturb the binding part in this block of a plain ViT.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=Training.steps, show_default=True, help="Steps of training."
)
@click.option("--decay", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Weight decay of readouts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of positions, readouts and random weights.")
@device_option
@click.option("--out", type=UserPath(), metavar="DIR", help="Write binding.csv, binding.png and objects.png.")
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    data_root: Path,
    size: tuple[int, int],
    readouts: tuple[str, ...],
    levels: tuple[int, ...],
    pairs: str,
    positions: int,
    count: int | None,
    names: tuple[str, ...],
    settings: tuple[str, ...],
    reducers: tuple[str, ...],
    ablate: int | None,
    steps: int,
    decay: float,
    seed: int,
    device: str | None,
    out: Path | None,
) -> None:
    """Train readouts on pairs of positions of the frozen MODEL, a timm model, and judge pairs of the split val.

    A readout says whether two positions of a picture belong to one object. The area under the ROC curve decides; the
    column "inside of categories" compares pairs of one object with pairs of two objects of one category. Controls are
    always measured: the position alone, the pixels alone and, if MODEL has weights, the same model with random weights.
    Quote the gain over the best of them.

    Pyramids have a map for each stage; their levels are compared on their own grids and on the grid of stride 16.
    """
    mechanisms = [DENSE, *chosen(names, settings, reducers)]
    where = pick_device(device)
    if out is not None:
        check_folder(out)
    trained = checkpoint is not None or pretrained
    torch.manual_seed(seed)
    whole = load_timm_model(model, checkpoint, pretrained, size=size, any_record=True).eval().to(where)
    forms = {mechanism.name: mechanism.on(whole) for mechanism in mechanisms}
    if trained:
        torch.manual_seed(seed)
        forms[RANDOM] = load_timm_model(model, size=size).eval().to(where)
    sampling = Sampling(size, positions, pairs == "all", seed)
    config = resolve_model_data_config(whole)
    train, val = (Cells(read_instances(data_root, split, count), config, sampling) for split in ("train", "val"))
    depth = _check(whole, train, levels, where)
    effects = None if ablate is None else Effects(whole, ablate, where)
    if not trained:
        click.echo(f"note: {model} has random weights; give weights with --checkpoint FILE or --pretrained", err=True)
    training = Training(steps, decay=decay, seed=seed)
    outcomes: list[Outcome] = []
    kept: dict[Key, nn.Module] = {}
    about = results.about(where, "timm", "torchmetrics")
    shape = f"{len(train)}+{len(val)}x3x{size[0]}x{size[1]}"

    def judged(form: str, level: int | None, grid: Grid, samples: tuple[Sampled, Sampled], key: Key | None) -> None:
        own, other = samples[0].standardised(samples[0]), samples[1].standardised(samples[0])
        for name in readouts if own.mixed() and other.mixed() else ():
            readout = fit(name, own, training)
            found = scores(readout, other) | {TRAIN: scores(readout, own)[AUC]}
            outcomes.append(Outcome(form, level, 0 if level is None else (level + 1) / depth, grid, name, found))
            if form == DENSE.name and key is not None:
                kept[key] = readout

    dense: Mapping[Key, tuple[Grid, Sampled]] = {}
    for form, changed in forms.items():
        with steps_of(f"{form}: maps", len(train) + len(val)) as done:
            own, other = (of_model(changed, part, where, done) for part in (train, val))
        taken = [key for key in own if not levels or key[0] in levels]
        if form == DENSE.name:
            dense = own
            for grid in dict.fromkeys(own[key][0] for key in taken):
                for name, control in ((PLACE, of_place), (PIXELS, of_pixels)):
                    judged(name, None, grid, (control(train, grid), control(val, grid)), None)
        with steps_of(f"{form}: readouts", len(taken)) as done:
            for key in taken:
                judged(form, key[0], own[key][0], (own[key][1], other[key][1]), key)
                done()
        if not any(outcome.form == form for outcome in outcomes):
            raise InputError(
                "no grid has pairs of both kinds, one object and two, in both splits: take more pictures, a larger "
                "--size, or --pairs all"
            )
        if out is not None:
            results.write(out / "binding.csv", rows_of(model, shape, outcomes, seed, about))
    head, lines = table(outcomes)
    print_table(lines, head, right=(1, *range(4, len(head))))
    for grid, shares in train.usable.items():
        share = 1 - sum(shares) / len(shares)
        click.echo(
            f"{grid[0]}x{grid[1]}: {share:.0%} of the cells show no instance or background by half, and are left out"
        )
        if not any(outcome.grid == grid for outcome in outcomes):
            click.echo(f"not run: {grid[0]}x{grid[1]}: the cells have no pairs of both kinds, one object and two")
    click.echo(f"{data_root.resolve().name}, {shape}, {pairs}, {steps} steps; {about[1]}")
    if effects is not None:
        head, lines = effects.table(train, val, training)
        print_table(lines, head, right=tuple(range(1, len(head))))
    if out is not None:
        with written_whole(out / "binding.png") as temporary:
            draw(outcomes, temporary)
        best = max((x for x in outcomes if x.form == DENSE.name), key=lambda x: x.metrics[AUC])
        key = next(key for key, (grid, _) in dense.items() if key[0] == best.level and grid == best.grid)
        with written_whole(out / "objects.png") as temporary:
            similarity(whole, val, key[0], best.grid, kept[key], dense[key][1], where, _DRAWN).save(temporary)
        click.echo(f"wrote {out / 'binding.csv'}, {out / 'binding.png'} and {out / 'objects.png'}")


def _check(model: nn.Module, data: Cells, levels: Sequence[int], device: torch.device) -> int:
    """The number of levels; InputError if the model has none, or not all of those that are named."""
    count = len(levels_of(model, data.image(0).to(device)))
    if other := [level for level in levels if not 0 <= level < count]:
        raise InputError(f"--level {other[0]}: the levels are 0 to {count - 1}")
    return count

"""`terrazzo bench reduce`: what a plain timm ViT gains and loses by merging tokens in each block."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from terrazzo.backbones._reduce import reduce
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.console import print_table
from terrazzo.tools.data.floors import FloorMaker
from terrazzo.tools.data.pictures import find_pictures
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.timing import FORWARD, interleaved, throughput_timer
from terrazzo.tools.models import build_on_meta
from terrazzo.tools.options import UserPath
from terrazzo.tools.targets import load_timm_model, pick_device

MACS, POOLED, MAP = "multiply-adds", "cosine of the vector", "cosine of the map"
_R = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0)
_FLOORS = 16  # pictures that are drawn if the user names none

_positive = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("model")
@click.option(
    "--r",
    "counts",
    type=click.FloatRange(min=0),
    multiple=True,
    default=_R,
    show_default=True,
    help="Tokens that a block merges, or the share of tokens if below 1; repeatable.",
)
@click.option("--blocks", metavar="N,N...", help="Which blocks merge, counted from 0 [default: all but the first].")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16),
    show_default=True,
    help="Batch size; repeatable.",
)
@click.option(
    "--images",
    type=UserPath(),
    multiple=True,
    help="Pictures, or folders of pictures, to compare features on [default: drawn pictures].",
)
@click.option("--checkpoint", type=UserPath(), metavar="FILE", help="Weights.")
@click.option("--pretrained", is_flag=True, help="Download the published weights.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one.")
@click.option("--seconds", type=_positive, default=2.0, show_default=True, help="Time for each figure.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows as CSV.")
def command(
    model: str,
    counts: tuple[float, ...],
    blocks: str | None,
    batches: tuple[int, ...],
    images: tuple[Path, ...],
    checkpoint: Path | None,
    pretrained: bool,
    device: str | None,
    seconds: float,
    out: Path | None,
) -> None:
    """Reduce MODEL, a plain timm ViT, by several r: images per second, multiply-adds, and how far features drift.

    Drift is the mean cosine to the unreduced model's features of a picture: of the vector that it classifies, and of
    each position of its last map.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    where = pick_device(device)
    at = None if blocks is None else _numbers(blocks)
    whole = load_timm_model(model, checkpoint, pretrained, any_record=True)
    if checkpoint is None and not pretrained:
        click.echo(
            f"note: {model} has random weights, and their features drift differently; see --pretrained", err=True
        )
    counts = tuple(dict.fromkeys((0.0, *counts)))
    models = {_name(r, at): reduce(copy.deepcopy(whole), r=r, blocks=at).to(where) for r in counts}
    inputs = _inputs(whole, images).to(where)
    shape = "x".join(map(str, inputs.shape[1:]))
    found = {}
    for r, (name, reduced) in zip(counts, models.items()):
        on_meta = reduce(build_on_meta(model), r=r, blocks=at)
        found[f"1x{shape}", name, MACS, "1"] = (measure(on_meta, tuple(inputs.shape[2:]), inputs.shape[1]).macs,) * 3
        for metric, cosine in _drift(next(iter(models.values())), reduced, inputs).items():
            found[f"{len(inputs)}x{shape}", name, metric, "1"] = (cosine,) * 3
    for batch in batches:
        many = torch.cat([inputs] * -(-batch // len(inputs)))[:batch]
        calls = {name: partial(_infer, reduced, many) for name, reduced in models.items()}
        for call in calls.values():
            call()
        for name, times in interleaved(calls, seconds, throughput_timer(where)).items():
            found[f"{batch}x{shape}", name, FORWARD, "ms"] = tuple(1e3 * time for time in times)
    about = results.about(where, "timm")
    rows = [
        results.Row("reduce", model, size, "float32", name, metric, unit, *figures, *about)
        for (size, name, metric, unit), figures in found.items()
    ]
    head, lines = table(rows)
    print_table(lines, head, right=tuple(range(1, len(head))))
    click.echo(f"{rows[0].device}; {rows[0].versions}; median times, measured in turns")
    if out is not None:
        results.write(out, rows)
        click.echo(f"wrote {out}")


def table(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: what each r costs, gains and loses."""
    shapes = list(dict.fromkeys(row.shape for row in rows if row.metric == FORWARD))
    times = {(row.backend, row.shape): row.p50 for row in rows if row.metric == FORWARD}
    facts = {(row.backend, row.metric): row.p50 for row in rows if row.metric != FORWARD}
    first, *_ = names = list(dict.fromkeys(row.backend for row in rows))
    lines = []
    for name in names:
        line = [name, f"{facts[name, MACS] / 1e9:.2f}", f"{facts[name, POOLED]:.4f}", f"{facts[name, MAP]:.4f}"]
        for shape in shapes:
            time = times[name, shape]
            line += [f"{1e3 * int(shape.split('x')[0]) / time:.4g}", f"{times[first, shape] / time:.2f} x"]
        lines.append(tuple(line))
    heads = (part for shape in shapes for part in (f"images/s, {shape.split('x')[0]} at once", "of unreduced"))
    return ("merged", "MACs, G", POOLED, MAP, *heads), lines


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--blocks takes numbers such as 3,6,9, got {text!r}") from None


def _name(r: float, blocks: tuple[int, ...] | None) -> str:
    if r == 0:
        return "nothing"
    where = "each block but the first" if blocks is None else f"blocks {', '.join(map(str, blocks))}"
    return f"{f'{r:.0%}' if r < 1 else int(r)} in {where}"


def _inputs(model: nn.Module, places: Sequence[Path]) -> torch.Tensor:
    """Pictures as the model takes them."""
    config = resolve_model_data_config(model)
    if places:
        pictures = [picture.read() for picture in find_pictures(places)]
    else:
        maker = FloorMaker(0, max(config["input_size"][1:]))
        pictures = [Image.fromarray(maker.make().image) for _ in range(_FLOORS)]
    transform = create_transform(**config, is_training=False)
    return torch.stack([transform(picture) for picture in pictures])


@torch.inference_mode()
def _infer(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


@torch.inference_mode()
def _drift(whole: nn.Module, reduced: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Mean cosines, computed picture by picture."""
    cosines: dict[str, list[float]] = {POOLED: [], MAP: []}
    for image in images.split(1):
        (old, (old_map,)), (new, (new_map,)) = (
            model.forward_intermediates(image, indices=1, norm=True) for model in (whole, reduced)
        )
        pair = (model.forward_head(x, pre_logits=True) for model, x in ((whole, old), (reduced, new)))
        cosines[POOLED].append(F.cosine_similarity(*pair).item())
        cosines[MAP].append(F.cosine_similarity(old_map, new_map).mean().item())
    return {metric: sum(values) / len(values) for metric, values in cosines.items()}

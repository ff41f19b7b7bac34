"""`terrazzo bench reduce`: what a plain timm ViT gains and loses by fewer tokens, over r or at equal multiply-adds."""

import copy
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import nn

from terrazzo.backbones._hosts import check_host
from terrazzo.backbones._reduce import reduce
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench import drift, reducers
from terrazzo.tools.bench.drift import MAP, POOLED
from terrazzo.tools.bench.reducers import MACS
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.timing import FORWARD, interleaved, throughput_timer
from terrazzo.tools.mechanisms import on_meta
from terrazzo.tools.options import POSITIVE, UserPath, device_option, weights_options
from terrazzo.tools.targets import load_timm_model, pick_device

_R = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0)
_SHARES = (0.9, 0.75, 0.6, 0.5)


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
@click.option(
    "--methods",
    multiple=True,
    metavar="all|NAME[,KEY=VALUE...]",
    help="Compare methods of terrazzo.reduce at equal multiply-adds, instead of --r; repeatable.",
)
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    multiple=True,
    default=_SHARES,
    show_default=True,
    help="With --methods: the part of the multiply-adds that is left; repeatable.",
)
@click.option("--maps", is_flag=True, help="With --methods: count and time the pass that gives the last map.")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="H W",
    help="Size of the images, cut from the middle of the pictures [default: the model's].",
)
@weights_options
@device_option
@click.option("--seconds", type=POSITIVE, default=2.0, show_default=True, help="Time for each figure.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows as CSV.")
def command(
    model: str,
    counts: tuple[float, ...],
    blocks: str | None,
    batches: tuple[int, ...],
    images: tuple[Path, ...],
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    maps: bool,
    size: tuple[int, int] | None,
    checkpoint: Path | None,
    pretrained: bool,
    device: str | None,
    seconds: float,
    out: Path | None,
) -> None:
    """Reduce MODEL, a plain timm ViT, by several r: images per second, multiply-adds, and how far features drift.

    Drift is the mean cosine to the unreduced model's features of a picture: of the vector that it classifies, and of
    each position of its last map.

    With --methods, options are searched with which each method leaves a share of the multiply-adds. Uniform 2x2 pooling
    (`pool`) and Top-K (`evit,fuse=False`) are always in the table. A method as the table names it is a value of the
    --reduce of other commands.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    _check_together(methods)
    where = pick_device(device)
    at = None if blocks is None else _numbers(blocks)
    whole = load_timm_model(model, checkpoint, pretrained, size=size, any_record=True)
    if checkpoint is None and not pretrained:
        click.echo(
            f"note: {model} has random weights, and their features drift differently; see --pretrained", err=True
        )
    inputs = drift.inputs(whole, images, size).to(where)
    if methods:
        rows = _contest(whole.to(where), model, inputs, methods, shares, batches, seconds, maps)
    else:
        rows = _over_r(whole, model, inputs, counts, at, batches, seconds)
    if out is not None:
        results.write(out, rows)
        click.echo(f"wrote {out}")


def _check_together(methods: Sequence[str]) -> None:
    """InputError for options that only one of the two comparisons has, beside the other's, and for unknown methods."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in (("counts", "blocks") if methods else ("shares", "maps"))
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise InputError(f"{' and '.join(given)} {'cannot stand beside' if methods else 'needs'} --methods")
    reducers.named(methods)


def _contest(
    whole: nn.Module,
    model: str,
    inputs: torch.Tensor,
    methods: Sequence[str],
    shares: Sequence[float],
    batches: Sequence[int],
    seconds: float,
    maps: bool,
) -> list[results.Row]:
    """The rows of methods at equal multiply-adds, after their table."""
    check_host(whole, "reduced")
    found, wanting = reducers.contenders(whole, tuple(inputs.shape[2:]), methods, shares, maps)
    with progress("reducers", len(found)) as bar:
        rows = reducers.measured(
            whole, model, found, inputs, batches, seconds, maps, lambda: bar.advance(bar.task_ids[0])
        )
    _show(*reducers.table(rows), rows[0])
    for line in wanting:
        click.echo(f"not run: {line}")
    return rows


def _show(head: Sequence[str], lines: Sequence[Sequence[str]], row: results.Row) -> None:
    print_table(lines, head, right=tuple(range(2 if head[1] == "method" else 1, len(head))))
    click.echo(f"{row.device}; {row.versions}; median times, measured in turns")


def _over_r(
    whole: nn.Module,
    model: str,
    inputs: torch.Tensor,
    counts: Sequence[float],
    at: tuple[int, ...] | None,
    batches: Sequence[int],
    seconds: float,
) -> list[results.Row]:
    """The rows of several r, after their table."""
    where, counts = inputs.device, tuple(dict.fromkeys((0.0, *counts)))
    models = {_name(r, at): reduce(copy.deepcopy(whole), r=r, blocks=at).to(where) for r in counts}
    shape = "x".join(map(str, inputs.shape[1:]))
    found, own = {}, drift.seen(next(iter(models.values())), inputs)
    for r, (name, reduced) in zip(counts, models.items()):
        macs = measure(reduce(on_meta(whole), r=r, blocks=at), tuple(inputs.shape[2:]), inputs.shape[1]).macs
        found[f"1x{shape}", name, MACS, "1"] = (macs,) * 3
        for metric, cosine in drift.drift(own, drift.seen(reduced, inputs)).items():
            found[f"{len(inputs)}x{shape}", name, metric, "1"] = (cosine,) * 3
    for batch in batches:
        for name, times in interleaved(drift.passes(models, inputs, batch), seconds, throughput_timer(where)).items():
            found[f"{batch}x{shape}", name, FORWARD, "ms"] = tuple(1e3 * time for time in times)
    about = results.about(where, "timm")
    rows = [
        results.Row("reduce", model, size, "float32", name, metric, unit, *figures, *about)
        for (size, name, metric, unit), figures in found.items()
    ]
    _show(*table(rows), rows[0])
    return rows


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

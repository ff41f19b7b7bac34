"""`terrazzo bench scaling`: how the time of backbones grows with the pixels of an image."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench import exponents
from terrazzo.tools.bench.exponents import MACS, WHAT
from terrazzo.tools.bench.families import requested
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.files import check_output_file, check_plot
from terrazzo.tools.inspect.maps import last_map
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.timing import (
    FORWARD,
    Function,
    Quantiles,
    interleaved,
    reason_of,
    throughput_timer,
)
from terrazzo.tools.models import build_on_meta, options_for
from terrazzo.tools.options import POSITIVE, UserPath, device_option
from terrazzo.tools.targets import load_timm_model, pick_device

SIDES = (224, 320, 448, 640, 896, 1280, 1792, 2048)


@dataclass
class _Found:
    """The figures of a model by side, and why larger sides have none."""

    times: dict[int, Quantiles]
    macs: dict[int, float]
    reason: str | None = None


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--side",
    "sides",
    type=click.IntRange(min=1),
    multiple=True,
    default=SIDES,
    show_default=True,
    help="Height and width of an image; repeatable, at least twice.",
)
@device_option
@click.option(
    "--seconds",
    type=POSITIVE,
    default=1.0,
    show_default=True,
    help="Time for each model and side.",
)
@click.option(
    "--turns", type=click.IntRange(min=2), default=3, show_default=True, help="Turns of each model and side, at least."
)
@click.option(
    "--most",
    type=POSITIVE,
    default=30.0,
    show_default=True,
    help="Leave out sides at which one call would take more than this many seconds.",
)
@click.option("--out", type=UserPath(), metavar="FILE.csv", help="Write the rows as CSV, after every model.")
@click.option("--picture", type=UserPath(), metavar="FILE.png", help="Draw the times over the pixels.")
def command(
    models: tuple[str, ...],
    sides: Sequence[int],
    device: str | None,
    seconds: float,
    turns: int,
    most: float,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Time each MODEL, of timm or of the zoo, on images of several sizes, and fit the exponent of its growth.

    Without MODEL, these are a small model of every family, and Swin, ConvNeXt and DeiT. Time and multiply-adds are
    those of one image up to the last feature map, with random weights. An exponent of 1 means that twice the pixels
    take twice the time; softmax attention to all tokens tends to 2.
    """
    sides = tuple(sorted(set(sides)))
    if len(sides) < 2:
        raise InputError("an exponent needs at least two sides: give --side twice")
    models = requested(models)
    where = pick_device(device)
    if out is not None:
        check_output_file(out)
    if picture is not None:
        check_plot(picture)
    about = results.about(where, "timm")
    rows: list[results.Row] = []
    reasons: dict[str, str] = {}
    with progress("scaling", len(models) * len(sides)) as bar:
        for name in models:
            bar.update(bar.task_ids[0], description=name)
            found = _measure(name, sides, where, seconds, turns, most, lambda: bar.advance(bar.task_ids[0]))
            if found.reason is not None:
                reasons[name] = found.reason
            for side, times in found.times.items():
                figures = ((FORWARD, "ms", tuple(1e3 * time for time in times)), (MACS, "1", (found.macs[side],) * 3))
                rows += [
                    results.Row(WHAT, name, f"1x3x{side}x{side}", "float32", "eager", metric, unit, *values, *about)
                    for metric, unit, values in figures
                ]
            if out is not None:
                results.write(out, rows)
    head, lines = exponents.table(rows)
    print_table(lines, head, right=tuple(range(1, len(head))))
    click.echo(f"{about[0]}; {about[1]}; median times; the sides of a model were measured in turns")
    for name, reason in reasons.items():
        click.echo(f"not run: {name}: {reason}")
    if picture is not None:
        with written_whole(picture) as temporary:
            exponents.draw(rows, temporary)
        click.echo(f"wrote {picture}")
    if out is not None:
        click.echo(f"wrote {out}")


def _measure(
    name: str,
    sides: Sequence[int],
    device: torch.device,
    seconds: float,
    turns: int,
    most: float,
    done: Callable[[], None],
) -> _Found:
    """Warm a model at one side after another while a call stays short enough, then time the sides in turns."""
    timer = throughput_timer(device)
    functions: dict[int, Function] = {}
    macs: dict[int, float] = {}
    warm: list[tuple[int, float]] = []
    reason = None
    for side in sides:
        if reason is None and warm and (guess := exponents.extrapolated(warm, side)) > most:
            reason = f"from side {side} on a call would take about {guess:.0f} s; see --most"
        if reason is None:
            try:
                function = _function(name, side, device)
                if not warm:
                    function()  # the first call of all may compile kernels
                warm.append((side, timer(function)))
                functions[side], macs[side] = function, _macs(name, side)
            except Exception as error:  # whatever goes wrong, other models are measured
                reason = f"at side {side}: {reason_of(error)}"
                gc.collect()
        done()
    return _Found(interleaved(functions, seconds, timer, turns), macs, reason)


def _function(name: str, side: int, device: torch.device) -> Function:
    model = load_timm_model(name, size=(side, side)).eval().to(device)
    return partial(last_map, model, torch.randn(1, 3, side, side, device=device))


def _macs(name: str, side: int) -> float:
    try:
        # Without the classifier, whose cost does not depend on the image.
        return float(measure(build_on_meta(name, num_classes=0, **options_for(name, (side, side))), side).macs)
    except Exception as error:  # a model of timm may do what cannot be counted; its time is measured all the same
        click.echo(f"note: the multiply-adds of {name} cannot be counted: {reason_of(error)}", err=True)
        return math.nan

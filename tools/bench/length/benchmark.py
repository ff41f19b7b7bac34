"""`terrazzo bench length`: how time, memory and multiply-adds grow with the number of tokens."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.exponents import MACS, exponent, extrapolated
from terrazzo.tools.bench.length.probe import Found, found
from terrazzo.tools.bench.length.subject import check, is_mixer, subject
from terrazzo.tools.console import human, print_table, progress
from terrazzo.tools.files import check_output_file
from terrazzo.tools.inspect.measure import measure
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, reason_of
from terrazzo.tools.models import build_on_meta
from terrazzo.tools.options import POSITIVE, UserPath, device_option
from terrazzo.tools.targets import pick_device

WHAT, DENSE = "length", "softmax"
LENGTHS = (1024, 4096, 16384, 65536)
MEMORY = {FORWARD: "peak memory, forward", TRAINING: "peak memory, forward+backward"}
_FITTED = 3
"""Exponents are fitted to this many of the largest lengths."""


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--lengths",
    type=click.IntRange(min=4),
    multiple=True,
    metavar="N...",
    help="Numbers of tokens; repeatable, and numbers may follow each other [default: 1024 4096 16384 65536].",
)
@device_option
@click.option(
    "--seconds",
    type=POSITIVE,
    default=1.0,
    show_default=True,
    help="Time for each figure; there are at least five calls.",
)
@click.option(
    "--most",
    type=POSITIVE,
    default=30.0,
    show_default=True,
    help="Do not run lengths at which forward and backward would take more than this many seconds.",
)
@click.option("--out", type=UserPath(), metavar="FILE.csv", help="Write the rows as CSV, after every length.")
def command(
    models: tuple[str, ...], lengths: tuple[int, ...], device: str | None, seconds: float, most: float, out: Path | None
) -> None:
    """Measure each MODEL at several numbers of tokens: time, peak memory, multiply-adds, and exponents of the growth.

    MODEL is a mixer, NAME[,KEY=VALUE...], in one layer of 64 channels and 4 heads, or a model of timm, whose tokens are
    the places of its first map. Softmax attention is measured beside mixers. Each length runs in a process of its own.
    A length that the machine cannot hold, or that would take too long, stays in the table, with the reason.
    """
    lengths, models = _sorted_out(models, lengths)
    where = pick_device(device)
    if out is not None:
        check_output_file(out)
    about = results.about(where, "timm")
    rows: list[results.Row] = []
    reasons: dict[tuple[str, int], str] = {}
    with progress("length", len(models) * len(lengths)) as bar:
        for name in models:
            warm: list[tuple[float, float]] = []
            for length in lengths:
                bar.update(bar.task_ids[0], description=f"{name}, {length}")
                guess = extrapolated(warm, math.sqrt(length)) if warm else 0.0
                if guess > most:
                    one = Found({}, {}, f"one call would take about {guess:.0f} s; see --most")
                else:
                    one = found(name, length, where, seconds)
                if one.reason is None:
                    warm.append((math.sqrt(length), one.times[TRAINING][1]))
                else:
                    reasons[name, length] = one.reason
                rows += [results.Row(WHAT, name, str(length), "float32", "eager", *row, *about) for row in _rows(one)]
                rows.append(
                    results.Row(
                        WHAT, name, str(length), "float32", "eager", MACS, "1", *(_macs(name, length),) * 3, *about
                    )
                )
                bar.advance(bar.task_ids[0])
                if out is not None:
                    results.write(out, rows)
    head, lines = table(rows, reasons)
    print_table(lines, head, right=tuple(range(1, len(head))))
    head, lines = growth(rows)
    click.echo()
    print_table(lines, head, right=tuple(range(1, len(head))))
    click.echo(f"{about[0]}; {about[1]}; median times; exponents of the {_FITTED} largest lengths that ran")
    if out is not None:
        click.echo(f"wrote {out}")


def _sorted_out(models: Sequence[str], lengths: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Lengths and models; numbers that follow a number of --lengths arrive among the models."""
    numbers = tuple(int(name) for name in models if name.isdecimal())
    names = [name for name in models if not name.isdecimal()]
    if numbers and not lengths:
        raise InputError(f"{numbers[0]} is neither a model nor a mixer; put --lengths in front of numbers of tokens")
    if not names:
        raise InputError("name at least one model or mixer")
    for name in names:
        check(name)
    if any(map(is_mixer, names)):
        names.append(DENSE)
    lengths = tuple(sorted({*lengths, *numbers})) or LENGTHS
    if lengths[0] < 4:
        raise InputError(f"a length must be at least 4 tokens, got {lengths[0]}")
    return lengths, tuple(dict.fromkeys(names))


def _rows(one: Found) -> list[tuple[str, str, float, float, float]]:
    """Metric, unit and figures; NaN where nothing could be measured."""
    nothing = (math.nan,) * 3
    made = []
    for kind, memory in MEMORY.items():
        made.append((kind, "ms", *(1e3 * time for time in one.times.get(kind, nothing))))
        peak = one.memory.get(kind)
        made.append((memory, "MiB", *(nothing if peak is None else (peak / 2**20,) * 3)))
    return made


def _macs(name: str, length: int) -> float:
    try:
        what = subject(name, length)
        return float(measure(build_on_meta(what.model, **what.options), what.size, what.channels).macs)
    except Exception as error:  # a model may do what cannot be counted; its time is measured all the same
        click.echo(f"note: the multiply-adds of {name} cannot be counted: {reason_of(error)}", err=True)
        return math.nan


def _figures(rows: Sequence[results.Row]) -> dict[tuple[str, str], dict[int, float]]:
    """Medians by model and metric, and by length."""
    figures: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        figures.setdefault((row.variant, row.metric), {})[int(row.shape)] = row.p50
    return figures


def table(
    rows: Sequence[results.Row], reasons: Mapping[tuple[str, int], str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines, a line for each model and length; times of training also as multiples of others'."""
    figures = _figures(rows)
    names = list(dict.fromkeys(row.variant for row in rows))
    peers = list(dict.fromkeys([names[0], *(name for name in names if name == DENSE)]))
    lines = []
    for name in names:
        for length, time in figures[name, TRAINING].items():
            ratios = (_told(time / figures[peer, TRAINING][length], "{:.2f} x") for peer in peers)
            lines.append(
                (
                    name,
                    str(length),
                    _told(figures[name, FORWARD][length], "{:.4g}"),
                    _told(time, "{:.4g}"),
                    *ratios,
                    *(_told(figures[name, memory][length], "{:.0f}") for memory in MEMORY.values()),
                    "" if math.isnan(macs := figures[name, MACS][length]) else human(macs),
                    reasons.get((name, length), ""),
                )
            )
    head = (
        *("model", "tokens", "forward, ms", "forward+backward, ms"),
        *(f"of {peer}" for peer in peers),
        *("peak, MiB", "peak with backward, MiB", MACS, "not run"),
    )
    return head, lines


def growth(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: the exponent of each model's growth in tokens."""
    figures = _figures(rows)
    metrics = (FORWARD, TRAINING, *MEMORY.values(), MACS)
    lines = []
    for name in dict.fromkeys(row.variant for row in rows):
        told = []
        for metric in metrics:
            there = {length: value for length, value in figures[name, metric].items() if value > 0}
            last = sorted(there)[-_FITTED:]
            told.append(_told(exponent({math.sqrt(length): there[length] for length in last}), "{:.2f}"))
        lines.append((name, *told))
    return ("exponent of", *metrics), lines


def _told(value: float, text: str) -> str:
    return "" if math.isnan(value) else text.format(value)

"""Exponents of the growth of time with pixels, from the rows of `terrazzo bench scaling`, as a table and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from terrazzo.tools import results
from terrazzo.tools.inspect.timing import FORWARD

WHAT = "scaling"
MACS = "multiply-adds"
_STEEPEST = 2.0
_UPPER = 0.25
"""Sides whose pixels are at least this part of the largest side's make the exponent of large images."""


def exponent(figures: Mapping[float, float]) -> float:
    """The slope of log(figure) over log(pixels), by least squares; `figures` are by side. NaN for fewer than two."""
    if len(figures) < 2:
        return math.nan
    pixels = [2 * math.log(side) for side in figures]
    return float(np.polyfit(pixels, np.log(list(figures.values())), 1)[0])


def extrapolated(warm: Sequence[tuple[float, float]], side: float) -> float:
    """Seconds at a side, by the last two of (side, seconds); by the steepest growth after the first."""
    (last, time) = warm[-1]
    power = _STEEPEST
    if len(warm) > 1:
        (before, less) = warm[-2]
        power = min(_STEEPEST, max(1.0, math.log(time / less) / (2 * math.log(last / before))))
    return time * (side / last) ** (2 * power)


def upper(figures: Mapping[int, float]) -> dict[int, float]:
    """The figures of the largest side and of sides down to half of it, where constant costs do not count."""
    largest = max(figures)
    return {side: value for side, value in figures.items() if side**2 >= _UPPER * largest**2}


def by_model(rows: Sequence[results.Row], metric: str) -> dict[str, dict[int, float]]:
    """A metric's medians by model and side."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.metric == metric:
            found.setdefault(row.variant, {})[int(row.shape.rsplit("x", 1)[1])] = row.p50
    return found


def table(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines, a line for each model, the flattest first."""
    times, macs = by_model(rows, FORWARD), by_model(rows, MACS)
    lines = []
    for name in sorted(times, key=lambda name: exponent(times[name])):
        first, last = min(times[name]), max(times[name])
        lines.append(
            (
                name,
                f"{first} to {last}",
                f"{times[name][first]:.4g}",
                f"{times[name][last]:.4g}",
                _told(exponent(times[name])),
                _told(exponent(upper(times[name]))),
                _told(exponent(macs[name])),
                _told(exponent(upper(macs[name]))),
            )
        )
    head = (
        "model",
        "sides",
        "first, ms",
        "last, ms",
        "exponent of time",
        "large images",
        "exponent of multiply-adds",
        "large images",
    )
    return head, lines


def _told(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def draw(rows: Sequence[results.Row], path: Path) -> None:
    """Times over pixels on logarithmic axes; the legend has the exponents."""
    from matplotlib.figure import Figure

    times = by_model(rows, FORWARD)
    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(sorted(times, key=lambda name: exponent(times[name]))):
        sides = sorted(times[name])
        style = ("-", "--", ":")[index // 10 % 3]
        label = f"{name}  {exponent(times[name]):.2f}"
        pixels = [side**2 for side in sides]
        axes.plot(pixels, [times[name][side] / 1e3 for side in sides], style, marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel="image", ylabel="seconds")
    sides = sorted({side for found in times.values() for side in found})
    axes.set_xticks([side**2 for side in sides], [f"{side} x {side}" for side in sides], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    title = "model and exponent of its time"
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, title=title)
    figure.savefig(path, dpi=120)

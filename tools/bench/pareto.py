"""A picture of what mixers gain and lose: the cosine of maps over the gain in time, a panel for each image size."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from terrazzo.tools import results
from terrazzo.tools.bench.mechanisms import MAP, gain_of

_MARKERS = "osD^v<>PX*phH8d"
_COLUMNS = 2


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates, by the first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def draw(rows: Sequence[results.Row], path: Path) -> None:
    """Draw the rows of `terrazzo bench mixers`; a line joins the best forms of each size."""
    figures = {(row.shape, row.backend, row.metric): row.p50 for row in rows}
    names = list(dict.fromkeys(row.backend for row in rows))
    looks = {name: {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}
    shapes = list(dict.fromkeys(row.shape for row in rows))
    columns = min(len(shapes), _COLUMNS)
    lines = math.ceil(len(shapes) / columns)
    figure = Figure(figsize=(1.5 + 4 * columns, 1.2 + 3 * lines + 0.12 * len(names)), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    handles = {}
    for axes, shape in zip(panels, shapes):
        points = {
            name: (gain_of(figures, shape, name), figures[shape, name, MAP])
            for name in names
            if (shape, name, MAP) in figures
        }
        axes.plot(*zip(*front(list(points.values()))), color="0.6", zorder=1)
        for name, point in points.items():
            handles[name] = axes.scatter(*point, **looks[name], s=45, zorder=2)
        axes.set_title(f"{shape.split('x', 2)[2]} pixels", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    for axes in panels[: len(shapes)][-columns:]:
        axes.set_xlabel("times as fast as dense attention")
        axes.tick_params(labelbottom=True)
    figure.supylabel(MAP)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

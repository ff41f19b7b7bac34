"""A picture of what mixers gain and lose: the cosine of maps over the gain in time, a colour for each image size."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from terrazzo.tools import results
from terrazzo.tools.bench.mechanisms import MAP, gain_of


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
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="times as fast as dense attention", ylabel=MAP)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    for index, shape in enumerate(dict.fromkeys(row.shape for row in rows)):
        names = [row.backend for row in rows if (row.shape, row.metric) == (shape, MAP)]
        points = [(gain_of(figures, shape, name), figures[shape, name, MAP]) for name in names]
        axes.plot(*zip(*front(points)), color=f"C{index}", alpha=0.5)
        axes.scatter(*zip(*points), color=f"C{index}", label=shape.split("x", 2)[2])
        for name, point in zip(names, points):
            axes.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=7, color=f"C{index}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="image")
    figure.savefig(path, dpi=140)

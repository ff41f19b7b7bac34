"""A picture of a sweep: the metric over the megapixels that the model sees, a line for each score."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from terrazzo.tools.zoom.sweep import FULL, ORACLE, Point

_NAMES = {
    "region": "region head",
    "entropy": "entropy of the coarse pass",
    "uncertainty": "uncertainty of the coarse boxes",
    "random": "random tiles",
    ORACLE: "oracle: what the fine pass corrects",
}


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the curve as a PNG file."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="megapixels per picture, coarse and fine with halos", ylabel=points[0].metric)
    for score in dict.fromkeys(point.score for point in points if point.score != FULL):
        line = sorted((p.megapixels, p.value) for p in points if p.score == score)
        look = dict(color="0.6", linestyle="--") if score == ORACLE else dict(marker="o", markersize=3.5)
        axes.plot(*zip(*line), label=_NAMES.get(score, score), **look)
    for point in points:
        if point.score == FULL:
            axes.scatter(point.megapixels, point.value, marker="*", s=120, color="k", label=FULL, zorder=3)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, format="png")

"""What probes of one model found, as a table, as rows and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from terrazzo.tools import results
from terrazzo.tools.data.labelled import LabelledPictures
from terrazzo.tools.predict.draw import colour_map, grid, palette

MIOU, ACCURACY, MAP = "mIoU", "pixel accuracy", "cosine of the map"
_DRAWN_WIDTH = 320


@dataclass(frozen=True)
class Outcome:
    """What one probe found on one form of a model.

    Attributes:
        name: the form, and the maps on which the probe was trained if they are not the dense model's.
        miou, accuracy: in percent.
        cosine: of the validation maps to the dense model's maps, the mean over positions and pictures.
        drawn: predicted label maps, by index of the validation picture.
    """

    name: str
    miou: float
    accuracy: float
    cosine: float
    drawn: dict[int, np.ndarray] = field(default_factory=dict)


def table(outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines; the first outcome is the dense model's, and the others are compared with it."""
    lines = []
    for outcome in outcomes:
        lost = f"{outcome.miou - outcomes[0].miou:+.1f}" if outcome is not outcomes[0] else ""
        lines.append(
            (outcome.name, f"{outcome.miou:.1f}", lost, f"{outcome.accuracy:.1f}", f"{outcome.cosine:.4f}"),
        )
    return ("model", f"{MIOU}, %", "to dense", f"{ACCURACY}, %", MAP), lines


def rows_of(
    what: str, model: str, shape: str, outcomes: Sequence[Outcome], about: tuple[str, str, str]
) -> list[results.Row]:
    """A row for each outcome and figure; `what`, `shape` and `about` are columns of all rows."""
    rows = []
    for outcome in outcomes:
        figures = ((MIOU, "%", outcome.miou), (ACCURACY, "%", outcome.accuracy), (MAP, "1", outcome.cosine))
        for metric, unit, value in figures:
            rows.append(
                results.Row(what, model, shape, "float32", outcome.name, metric, unit, value, value, value, *about)
            )
    return rows


def draw(data: LabelledPictures, outcomes: Sequence[Outcome]) -> Image.Image:
    """Validation pictures, their labels, and what each probe predicts, side by side."""
    colours = palette(len(data.classes), data.palette)
    rows, size = [], None
    for index in outcomes[0].drawn:
        image = data.val.pictures[index].read()
        maps = [data.val.labels[index], *(outcome.drawn[index] for outcome in outcomes)]
        rows.append([image, *(Image.fromarray(colour_map(labels, colours)) for labels in maps)])
    size = (_DRAWN_WIDTH, round(_DRAWN_WIDTH * rows[0][0].height / rows[0][0].width))
    resampling = Image.Resampling
    rows = [
        [one.resize(size, resampling.NEAREST if i else resampling.BICUBIC) for i, one in enumerate(r)] for r in rows
    ]
    titles = ["picture", "labels", *(outcome.name for outcome in outcomes)]
    return grid(rows, titles, list(zip(data.classes, colours)))

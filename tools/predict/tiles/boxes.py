"""Detectors on pictures in tiles: boxes cut by a tile's edge are dropped, and duplicates are suppressed (NMS)."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.draw import Colour, Mask
from terrazzo.tools.predict.prediction import Prediction, Things, box_prediction
from terrazzo.tools.predict.tiles.grid import Grid, Report, lay

_EDGE = 2
"""Pixels from a tile's edge within which a box counts as cut by it: boxes are not exact."""


class Detector(Protocol):
    """A detector in the picture's own pixels.

    Attributes:
        min_score: weaker detections are left out.
        iou_threshold: two boxes of a class that overlap more are one thing.
    """

    min_score: float
    iou_threshold: float

    def things(self, images: Sequence[Image.Image]) -> list[Things]:
        """What is in each picture."""
        ...

    def classes(self) -> tuple[Sequence[str], list[Colour]]:
        """Names and colours of the classes."""
        ...


class BoxTiles:
    """A detector on pictures in tiles, at their own resolution.

    Args:
        detector: what a predictor of a config or of a file gives.
        tile: side of a tile in pixels.
        overlap: pixels that neighbours share: a thing that is larger in both directions may be cut by every tile.
    """

    note = None

    def __init__(self, detector: Detector, tile: int, overlap: int):
        self.detector, self.tile, self.overlap = detector, tile, overlap

    def predict(self, picture: Windows, batch: int, report: Report) -> Prediction:
        """The prediction; the record has `tiles`."""
        things, masks, facts = self.found(picture, batch, report)
        image = picture.read(0, 0, picture.width, picture.height)
        found = box_prediction(image, things, *self.detector.classes(), self.detector.min_score, masks)
        return dataclasses.replace(found, record={**found.record, "tiles": facts})

    def found(self, picture: Windows, batch: int, report: Report) -> tuple[Things, list[Mask] | None, dict]:
        """The things of a whole picture, their masks, and facts for the record.

        Args:
            batch: how many tiles run together.
            report: is told after each batch how many tiles are done, and how many there are.
        """
        grid = lay(picture.width, picture.height, self.tile, self.overlap)
        places = [(row, column) for row in grid.rows for column in grid.columns]
        boxes, labels, scores = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
        masks: list[Mask] = []
        cut = 0
        for first in range(0, len(places), batch):
            taken = places[first : first + batch]
            images = [picture.read(column.start, row.start, column.end, row.end) for row, column in taken]
            for (row, column), things in zip(taken, self.detector.things(images), strict=True):
                edges = (column.start, row.start, column.end, row.end)
                whole = ~_cut(things.boxes, edges, grid)
                cut += int((~whole).sum())
                boxes.append(things.boxes[whole] + torch.tensor(edges[:2] * 2))
                labels.append(things.labels[whole])
                scores.append(things.scores[whole])
                if things.masks is not None:
                    masks += [_placed(mask, *edges[:2]) for mask in things.masks[whole].numpy()]
            report(min(first + batch, len(places)), len(places))
        everything = Things(torch.cat(boxes), torch.cat(labels), torch.cat(scores), None)
        kept = everything.scores.argsort(descending=True, stable=True)
        facts: dict = {"how": "whole"}
        if grid.count > 1:
            kept = batched_nms(everything.boxes, everything.scores, everything.labels, self.detector.iou_threshold)
            facts = {"how": "boxes", "size": self.tile, "overlap": self.overlap, "count": grid.count}
            facts |= {"cut": cut, "duplicates": len(everything.scores) - len(kept)}
        own = [masks[index] for index in kept.tolist()] if masks else None
        return Things(everything.boxes[kept], everything.labels[kept], everything.scores[kept], None), own, facts


def _cut(boxes: Tensor, edges: tuple[int, int, int, int], grid: Grid) -> Tensor:
    """Which boxes, in a tile's own pixels, touch an edge of the tile that is no edge of the picture."""
    left, top, right, bottom = edges
    width, height = grid.size
    out = torch.zeros(len(boxes), dtype=torch.bool)
    if left > 0:
        out |= boxes[:, 0] < _EDGE
    if top > 0:
        out |= boxes[:, 1] < _EDGE
    if right < width:
        out |= boxes[:, 2] > right - left - _EDGE
    if bottom < height:
        out |= boxes[:, 3] > bottom - top - _EDGE
    return out


def _placed(mask: np.ndarray, left: int, top: int) -> Mask:
    """A mask of a tile, cut to its pixels, in the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Mask(np.zeros((0, 0), bool), left, top)
    # One row and one column of its surroundings show where the mask ends.
    pixels = mask[rows[0] : rows[-1] + 2, columns[0] : columns[-1] + 2]
    return Mask(pixels.copy(), left + int(columns[0]), top + int(rows[0]))

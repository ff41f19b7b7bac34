"""Boxes of two passes: which are kept, which are new, and which tile they count for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from terrazzo.gated_zoom._tiles import Grid, Window

SAME = 0.5
"""Two boxes of a class with at least this IoU are the same object."""


class Boxes(NamedTuple):
    """What a detector finds in a picture.

    Attributes:
        boxes: (N, 4), x1, y1, x2, y2 in pixels.
        scores: (N,), from 0 to 1.
        labels: (N,), indices of classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def at(self, index: Tensor) -> "Boxes":
        """The boxes of an index or a mask."""
        return Boxes(*(part[index] for part in self))


def moved(found: Boxes, crop: Window) -> Boxes:
    """Boxes of a crop, in the picture."""
    return found._replace(boxes=found.boxes + found.boxes.new_tensor([crop.left, crop.top, crop.left, crop.top]))


def tiles_of(boxes: Tensor, grid: Grid) -> Tensor:
    """The numbers of the tiles (N,) that hold the centres of boxes (N, 4)."""
    across = ((boxes[:, 0] + boxes[:, 2]) / 2 / grid.tile).long().clamp(0, grid.columns - 1)
    down = ((boxes[:, 1] + boxes[:, 3]) / 2 / grid.tile).long().clamp(0, grid.rows - 1)
    return down * grid.columns + across


def unite(coarse: Boxes, fine: Sequence[Boxes], grid: Grid, chosen: Sequence[int], iou: float = SAME) -> Boxes:
    """The boxes of both passes as one list.

    Small things come from the tiles, large things from the coarse pass: a coarse box in a chosen tile is kept if its
    short side is longer than half a tile. A box of a crop that the crop's edge cuts is dropped if a coarse box of
    its class overlaps it. Class-wise NMS unites the rest.

    Args:
        coarse: In the picture.
        fine: N boxes in their crops.
        grid: The tiles.
        chosen: N indices of tiles.
        iou: NMS drops a box whose IoU with a better box of its class is higher.
    """
    if not len(chosen):
        return coarse
    taken = torch.isin(tiles_of(coarse.boxes, grid), coarse.labels.new_tensor(list(chosen)))
    short = (coarse.boxes[:, 2:] - coarse.boxes[:, :2]).amin(1)
    parts = [coarse.at(~taken | (short > grid.tile / 2))]
    for index, found in zip(chosen, fine):
        crop = grid.crop(index)
        cut = _is_cut(found.boxes, crop, grid)
        found = moved(found, crop)
        parts.append(found.at(~(cut & _matched(found, coarse))))
    every = Boxes(*(torch.cat(values) for values in zip(*parts)))
    return every.at(batched_nms(every.boxes, every.scores, every.labels, iou))


def new_boxes(coarse: Boxes, fine: Sequence[Boxes], grid: Grid, least: float = 0.3) -> Tensor:
    """Targets of tiles without annotation: 1 for a tile in which the fine pass finds what the coarse pass does not.

    Args:
        coarse: In the picture.
        fine: Boxes in the crops of all tiles, in their order.
        grid: The tiles.
        least: Boxes with lower scores do not count.

    Returns:
        (rows, columns): for each tile the number of boxes with their centre in it that have no coarse box of their
        class with an IoU of .5, at most 1.
    """
    counts = coarse.scores.new_zeros(grid.count)
    for index, found in enumerate(fine):
        found = moved(found.at(found.scores >= least), grid.crop(index))
        fresh = ~_matched(found, coarse.at(coarse.scores >= least)) & (tiles_of(found.boxes, grid) == index)
        counts[index] = fresh.sum()
    return counts.clamp(max=1).view(grid.rows, grid.columns)


def recovered(coarse: Boxes, fine: Sequence[Boxes], truth: Boxes, grid: Grid, least: float = 0.3) -> Tensor:
    """Gains of tiles by the annotation: the annotated boxes that the coarse pass misses and the fine pass finds.

    A box is found by a box of its class with an IoU of at least .5. It counts for the tile that holds its centre.

    Args:
        coarse: In the picture.
        fine: Boxes in the crops of all tiles, in their order.
        truth: The annotated boxes, in the picture; their scores do not count.
        grid: The tiles.
        least: Boxes with lower scores do not count.

    Returns:
        (rows, columns), numbers of boxes.
    """
    missed = truth.at(~_matched(truth, coarse.at(coarse.scores >= least)))
    tiles, counts = tiles_of(missed.boxes, grid), coarse.scores.new_zeros(grid.count)
    for index, found in enumerate(fine):
        found = moved(found.at(found.scores >= least), grid.crop(index))
        counts[index] = _matched(missed.at(tiles == index), found).sum()
    return counts.view(grid.rows, grid.columns)


def uncertainty(coarse: Boxes, grid: Grid) -> Tensor:
    """Scores of tiles without training: 4 p (1 - p), summed over the coarse boxes with their centre in the tile.

    Boxes whose short side is longer than half of a tile do not count, because the coarse pass keeps them.

    Returns:
        (rows, columns), 0 or more.
    """
    small = (coarse.boxes[:, 2:] - coarse.boxes[:, :2]).amin(1) <= grid.tile / 2
    unsure = 4 * coarse.scores * (1 - coarse.scores) * small
    total = coarse.scores.new_zeros(grid.count).index_add(0, tiles_of(coarse.boxes, grid), unsure)
    return total.view(grid.rows, grid.columns)


def _matched(found: Boxes, others: Boxes) -> Tensor:
    """For each box whether another list has a box of its class that is the same thing, (N,)."""
    overlap = box_iou(found.boxes, others.boxes) * (found.labels[:, None] == others.labels)
    return (overlap >= SAME).any(1)


def _is_cut(boxes: Tensor, crop: Window, grid: Grid) -> Tensor:
    """For each box of a crop whether it touches an edge of the crop that is no edge of the picture, (N,)."""
    height, width = crop.bottom - crop.top, crop.right - crop.left
    x1, y1, x2, y2 = boxes.unbind(1)
    touches = torch.zeros_like(x1, dtype=torch.bool)
    for near, inside in (
        (x1 < 1, crop.left > 0),
        (y1 < 1, crop.top > 0),
        (x2 > width - 1, crop.right < grid.width),
        (y2 > height - 1, crop.bottom < grid.height),
    ):
        touches |= near & inside
    return touches

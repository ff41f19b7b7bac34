"""From the intersections of polygons to their overlaps, and to the boxes that survive their suppression."""

from collections.abc import Callable

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._polygons import overlapping, pairwise

UNION, FIRST = 0, 1


def overlaps(area: Tensor, other: Tensor, intersection: Tensor, mode: int) -> Tensor:
    """The intersection's share in the union, or in the first area; 0 where either area is 0."""
    whole = area if mode == FIRST else area + other - intersection
    empty = (area < 1e-14) | (other < 1e-14)
    return torch.where(empty, 0, intersection / whole.masked_fill(empty, 1))


def fill_overlaps(
    first: Tensor,
    second: Tensor,
    ious: Tensor,
    mode: int,
    aligned: bool,
    measure: Callable[[Tensor, Tensor, int], Tensor],
) -> None:
    """Fills `ious` with the measure of polygons row by row (aligned), or of all pairs (flat, by rows of the first)."""
    if aligned:
        ious.copy_(pairwise(lambda a, b: measure(a, b, mode), first, second))
        return
    rows, columns = overlapping(first, second)
    found = pairwise(lambda a, b: measure(a, b, mode), first[rows], second[columns])
    ious.zero_()
    ious.view(-1)[rows * len(second) + columns] = found.to(ious.dtype)


def survivors(count: int, first: Tensor, second: Tensor) -> Tensor:
    """Which boxes remain if, by descending score, each remaining box suppresses the boxes that it conflicts with.

    Args:
        count: boxes, numbered by descending score.
        first: the boxes that would suppress.
        second: for each of `first` a box of lower score that it would suppress.

    Returns:
        Whether each box remains.
    """
    keep = torch.ones(count, dtype=torch.bool, device=first.device)
    while True:
        # Each round settles at least one more box of every chain of conflicts, and a settled box stays as it is.
        following = torch.ones_like(keep)
        following[second[keep[first]]] = False
        if torch.equal(following, keep):
            return keep
        keep = following


def suppress(
    polygons: Tensor, order: Tensor, iou_threshold: float, measure: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Non-maximum suppression of polygons.

    Args:
        polygons: N 4 2, by descending score.
        order: N, the index that each polygon has for the caller.
        iou_threshold: a polygon is dropped if its overlap with a kept polygon is above this.
        measure: the overlap of pairs of polygons.

    Returns:
        `order` of the kept polygons.
    """
    first, second = overlapping(polygons, polygons, later=True)
    above = pairwise(measure, polygons[first], polygons[second]) > iou_threshold
    return order[survivors(len(polygons), first[above], second[above])]

"""Intersection over union of axis-aligned boxes."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable

UNION, FIRST = 0, 1


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fills `ious` with the overlaps of boxes.

    Args:
        bboxes1: N x 4, as x1 y1 x2 y2.
        bboxes2: M x 4.
        ious: N x M, or N if aligned; filled in place.
        mode: 0 intersection over union, 1 over the area of the first box.
        aligned: whether to take box i with box i only (N = M).
        offset: 0 or 1; added to widths and heights (1 if x2 and y2 are the last pixel inside).
    """
    first, second = computable(bboxes1), computable(bboxes2)
    if not aligned:
        first = first[:, None]
    area, other = ((boxes[..., 2:] - boxes[..., :2] + offset).prod(-1) for boxes in (first, second))
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    ious.copy_(intersection / (area if mode == FIRST else area + other - intersection))

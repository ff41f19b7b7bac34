"""Non-maximum suppression that says which boxes each kept box suppressed."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._overlaps import survivors
from terrazzo.openmmlab.ops.bbox_overlaps import UNION, bbox_overlaps


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups boxes: each kept box, then those that it suppressed, by descending score.

    Args:
        dets: N x 5, as x1 y1 x2 y2 and score.
        iou_threshold: a box is suppressed if its intersection over union with a kept box is not below this.

    Returns:
        The indices of each group, groups by descending score of the kept box.
    """
    order = dets[:, 4].argsort(descending=True, stable=True)
    boxes = dets[order, :4]
    ious = boxes.new_empty(len(boxes), len(boxes))
    bbox_overlaps(boxes, boxes, ious, UNION, False, 0)
    first, second = (ious >= iou_threshold).triu(1).nonzero().unbind(1)
    keep = survivors(len(boxes), first, second)
    # a box belongs to the best kept box that suppresses it, and a kept box to itself
    owner = torch.arange(len(boxes), device=dets.device).masked_fill_(~keep, len(boxes))
    owner.scatter_reduce_(0, second[keep[first]], first[keep[first]], "amin")
    groups: dict[int, list[int]] = {}
    for group, index in zip(owner.tolist(), order.tolist(), strict=True):
        groups.setdefault(group, []).append(index)
    return list(groups.values())

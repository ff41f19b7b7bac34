"""Non-maximum suppression of axis-aligned boxes."""

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Keeps each box that overlaps no kept box of higher score by more than the threshold.

    Args:
        boxes: N x 4, as x1 y1 x2 y2.
        scores: N.
        iou_threshold: a box is dropped if its intersection over union with a kept box is above this.
        offset: 0 or 1; added to widths and heights (1 if x2 and y2 are the last pixel inside).

    Returns:
        Indices of the kept boxes, by descending score.
    """
    if boxes.dtype not in (torch.float32, torch.float64):  # torchvision has no half precision on the CPU, no bf16
        boxes = boxes.float()
    if offset:
        # a width of x2 - x1 + 1, in areas and intersections alike, is the width of a box with the far corner 1 further
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)

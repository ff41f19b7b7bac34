"""Soft non-maximum suppression (Bodla et al., 2017): overlapping boxes lose score instead of being dropped."""

import torch
from torch import Tensor

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Takes the best box repeatedly, and lowers the score of each remaining box by its overlap with that box.

    Args:
        boxes: N x 4, as x1 y1 x2 y2, on the CPU.
        scores: N.
        dets: N x 5; its first K rows are filled with the taken boxes and their scores when taken.
        iou_threshold: overlap from which the naive (score to 0) and linear (times 1 - overlap) methods act.
        sigma: the Gaussian method multiplies by exp(-overlap^2 / sigma).
        min_score: a box is dropped if its lowered score is below this.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: 0 or 1; added to widths and heights.

    Returns:
        Indices of the K taken boxes, in the order in which they were taken.
    """
    work = boxes.double()
    x1, y1, x2, y2 = work.unbind(1)
    x2, y2 = x2 + offset, y2 + offset
    areas = (x2 - x1) * (y2 - y1)
    left = torch.arange(len(work))
    current = scores.double().clone()
    taken = []
    while len(left):
        best = left[current[left].argmax()]
        dets[len(taken), :4] = boxes[best]
        dets[len(taken), 4] = current[best]
        taken.append(best)
        left = left[left != best]
        width = (torch.minimum(x2[best], x2[left]) - torch.maximum(x1[best], x1[left])).clamp(min=0)
        height = (torch.minimum(y2[best], y2[left]) - torch.maximum(y1[best], y1[left])).clamp(min=0)
        inter = width * height
        overlap = inter / (areas[best] + areas[left] - inter)
        if method == GAUSSIAN:
            factor = torch.exp(-(overlap**2) / sigma)
        else:
            lowered = 1 - overlap if method == LINEAR else torch.zeros_like(overlap)
            factor = torch.where(overlap >= iou_threshold, lowered, 1.0)
        current[left] *= factor
        left = left[~(current[left] < min_score)]
    return torch.stack(taken) if taken else torch.empty(0, dtype=torch.long)

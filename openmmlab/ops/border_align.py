"""BorderAlign (Qiu et al., BorderDet, 2020, section 3.2): the largest feature along each side of a box."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable
from terrazzo.openmmlab.ops._pixels import bag_sums, bilinear, neighbours, pixel_rows, scattered


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """Fills `output` with the largest of the pool_size + 1 samples along each side.

    Args:
        input: B 4C H W; C channels each for the top, left, bottom and right side.
        boxes: B K 4, as x1 y1 x2 y2 in pixels of the map.
        output: B C K 4, filled in place.
        argmax_idx: as `output`, filled with the number of the largest sample.
        pool_size: steps per side.
    """
    features = computable(input).unflatten(1, (4, -1)).flatten(0, 1)  # B*4 C H W
    rows = pixel_rows(features)
    side = torch.arange(len(features), device=input.device).repeat_interleave(boxes.shape[1])
    fours = torch.full_like(side, 4)
    largest = place = None
    for step in range(pool_size + 1):
        y, x = _positions(computable(boxes), step, pool_size)  # B 4 K
        pixels, weights = bilinear(side, y.flatten(), x.flatten(), *features.shape[2:])
        values = bag_sums(rows, pixels.flatten(), weights.flatten(), fours)
        if largest is None:
            largest, place = values, torch.zeros_like(values, dtype=torch.int)
        else:
            place = place.masked_fill(values > largest, step)
            largest = torch.maximum(values, largest)
    output.copy_(largest.unflatten(0, (len(input), 4, -1)).permute(0, 3, 2, 1))
    argmax_idx.copy_(place.unflatten(0, (len(input), 4, -1)).permute(0, 3, 2, 1))


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Fills `grad_input` with the gradient of `border_align_forward` with respect to its input; arguments as there."""
    sides, channels, height, width = 4, grad_input.shape[1] // 4, *grad_input.shape[2:]
    values = computable(grad_output).permute(0, 3, 1, 2)  # B 4 C K
    step = argmax_idx.permute(0, 3, 1, 2)
    y, x = _positions(computable(boxes)[:, None], step, pool_size)
    plane = torch.arange(len(grad_input) * sides, device=grad_input.device)
    total = 0
    for row, weight_y in neighbours(y, height):
        for column, weight_x in neighbours(x, width):
            pixels, parts = row * width + column, values * weight_y * weight_x
            shape = torch.Size((len(plane), channels, height, width))
            total = total + scattered(shape, plane, pixels.flatten(0, 1), parts.flatten(0, 1))
    grad_input.copy_(total.view_as(grad_input))


def _positions(boxes: Tensor, step: int | Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Where a step lies on each side.

    The top and left sides run from x1 y1, the bottom and right sides back from x2 y2.

    Args:
        boxes: B K 4, or B 1 K 4 where `step` is a tensor.
        step: the step, or one for each side (B 4 C K).
        steps: steps per side.

    Returns:
        y and x, each B 4 K, or B 4 C K.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    across, down, zero = (x2 - x1) / steps, (y2 - y1) / steps, torch.zeros_like(x1)
    y, x = torch.stack([y1, y1, y2, y2], 1), torch.stack([x1, x1, x2, x2], 1)
    return y + torch.stack([zero, down, zero, -down], 1) * step, x + torch.stack(
        [across, zero, -across, zero], 1
    ) * step

"""Precise RoI pooling (Jiang et al., IoU-Net, 2018, section 3.3): the exact mean of the map in each bin."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable, gradients
from terrazzo.openmmlab.ops._pixels import bag_sums, bins_first, cells, pixel_rows


def prroi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Fills `output` with the integral of the bilinearly interpolated map over each bin, divided by the bin's area.

    Args:
        input: B C H W; 0 outside of the map.
        rois: N x 5, as index in the batch, x1 y1 x2 y2 in image pixels.
        output: N C pooled_height pooled_width, filled in place; 0 for a bin without area.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
    """
    output.copy_(_pool(computable(input), computable(rois), (pooled_height, pooled_width), spatial_scale))


def prroi_pool_backward(
    grad_output: Tensor, rois: Tensor, grad_input: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Fills `grad_input` with the gradient of `prroi_pool_forward` with respect to its input."""
    (gradient,) = gradients(
        lambda features: _pool(features, computable(rois), (pooled_height, pooled_width), spatial_scale),
        (torch.zeros_like(computable(grad_input)),),  # linear: its gradient is the same at every input
        grad_output,
    )
    grad_input.copy_(gradient)


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    grad_rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills `grad_rois` with the gradient of `prroi_pool_forward` with respect to its regions (0 for the index)."""
    (gradient,) = gradients(
        lambda regions: _pool(computable(input), regions, (pooled_height, pooled_width), spatial_scale),
        (computable(rois),),
        grad_output,
    )
    grad_rois.copy_(gradient)


def _pool(features: Tensor, rois: Tensor, bins: tuple[int, int], spatial_scale: float) -> Tensor:
    height, width = features.shape[2:]
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale).unbind(1)
    top, bottom = (edge[:, :, None].expand(-1, *bins).flatten() for edge in _edges(y1, y2, bins[0]))
    left, right = (edge[:, None, :].expand(-1, *bins).flatten() for edge in _edges(x1, x2, bins[1]))
    area = (bottom - top) * (right - left)
    first_row, rows = _reach(top, bottom, height)
    first_column, columns = _reach(left, right, width)
    bag, row, column = cells(rows * (area > 0), columns)
    row, column = first_row[bag] + row, first_column[bag] + column
    weight_y = _hat_integral(bottom[bag] - row) - _hat_integral(top[bag] - row)
    weight_x = _hat_integral(right[bag] - column) - _hat_integral(left[bag] - column)
    batch = rois[:, 0].detach().long()[bag // (bins[0] * bins[1])]
    pixels = (batch * height + row) * width + column
    sums = bag_sums(pixel_rows(features), pixels, weight_y * weight_x / area[bag], rows * (area > 0) * columns)
    return bins_first(sums, bins)


def _edges(start: Tensor, end: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Start and end of each bin on an axis; each N x bins."""
    size = ((end - start).clamp(min=0) / bins)[:, None]
    first = start[:, None] + size * torch.arange(bins, device=start.device)
    return first, first + size


def _reach(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first pixel of the map that interpolates into each interval, and the number of these pixels."""
    first = start.detach().floor().clamp(0, size).long()
    last = end.detach().ceil().clamp(-1, size - 1).long()
    return first, (last - first + 1).clamp(min=0)


def _hat_integral(end: Tensor) -> Tensor:
    """The integral of the hat max(0, 1 - |u|) from -1 to `end`."""
    end = end.clamp(-1, 1)
    return 0.5 + end - end * end.abs() / 2

"""RoIPool (Girshick, 2015, section 2.1): the largest feature in each bin of a region."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable
from terrazzo.openmmlab.ops._pixels import bag_maxima, bins_first, cells, pixel_rows, scattered


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills `output` with the largest feature of each bin, 0 for a bin without pixels.

    Bins are not rounded before they are divided, unlike torchvision's: bin i of n spans the pixels from
    floor(start + i * size) up to ceil(start + (i + 1) * size), and x2, y2 are the last pixel inside.

    Args:
        input: B C H W.
        rois: N x 5, as index in the batch, x1 y1 x2 y2 in image pixels.
        output: N C pooled_height pooled_width, filled in place.
        argmax: as `output`, filled with the pixel (row * W + column) of the largest feature, -1 for a bin without
            pixels.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
    """
    bins = (pooled_height, pooled_width)
    height, width = input.shape[2:]
    regions = computable(rois)
    x1, y1 = regions[:, 1] * spatial_scale, regions[:, 2] * spatial_scale
    x2, y2 = (regions[:, 3] + 1) * spatial_scale, (regions[:, 4] + 1) * spatial_scale
    top, bottom = (edge[:, :, None].expand(-1, *bins).flatten() for edge in _edges(y1, y2, pooled_height, height))
    left, right = (edge[:, None, :].expand(-1, *bins).flatten() for edge in _edges(x1, x2, pooled_width, width))
    present = ((x2 > x1) & (y2 > y1)).repeat_interleave(pooled_height * pooled_width)
    rows, columns = (bottom - top).clamp(min=0) * present, (right - left).clamp(min=0) * present
    bag, row, column = cells(rows, columns)
    batch = regions[:, 0].long()[bag // (pooled_height * pooled_width)]
    pixels = (batch * height + top[bag] + row) * width + left[bag] + column
    largest, place = bag_maxima(pixel_rows(computable(input)), pixels, rows * columns)
    place = torch.where((rows * columns > 0)[:, None], place % (height * width), -1)
    output.copy_(bins_first(largest, bins))
    argmax.copy_(bins_first(place, bins))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills `grad_input` with the gradient of `roi_pool_forward` with respect to its input; arguments as there."""
    values = computable(grad_output) * (argmax >= 0)
    grad_input.copy_(scattered(grad_input.shape, rois[:, 0].long(), argmax.long().clamp(min=0), values))


def _edges(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and the pixel after the last of each bin on an axis, clipped to the map; each N x bins."""
    steps = torch.arange(bins, device=start.device, dtype=start.dtype)
    bin_size = ((end - start) / bins)[:, None]
    first = (steps * bin_size + start[:, None]).floor()
    last = ((steps + 1) * bin_size + start[:, None]).ceil()
    return first.clamp(0, size).long(), last.clamp(0, size).long()

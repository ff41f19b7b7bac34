"""RoIAlign (He et al., 2017, section 3): bilinear samples in each bin of a region, averaged or maximised."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from terrazzo.openmmlab.ops._numerics import computable
from terrazzo.openmmlab.ops._pixels import (
    bag_maxima,
    bag_sums,
    bilinear,
    bin_samples,
    bins_first,
    neighbours,
    pixel_rows,
    scattered,
)

MAX, AVERAGE = 0, 1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` with the pooled features of each region.

    Args:
        input: B C H W.
        rois: N x 5, as index in the batch, x1 y1 x2 y2 in image pixels.
        output: N C aligned_height aligned_width, filled in place.
        argmax_y: as `output`, filled with the row of the largest sample; empty for the average.
        argmax_x: as `output`, filled with the column of the largest sample; empty for the average.
        aligned_height: bins down.
        aligned_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).
        pool_mode: 0 the largest sample of a bin, 1 the average. A bin without samples gives 0 either way.
        aligned: whether pixel centres lie at +0.5.
    """
    features = computable(input)
    regions = rois.to(features.dtype)
    if pool_mode == AVERAGE:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features, regions, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
            )
        )
        return
    rows, shape = pixel_rows(features), (*features.shape[2:], aligned_height, aligned_width)
    # a few regions at a time, because all samples are stored
    parts = [_largest(rows, part, shape, spatial_scale, sampling_ratio, aligned) for part in regions.split(16)]
    for target, values in zip((output, argmax_y, argmax_x), zip(*parts, strict=True), strict=False):
        target.copy_(torch.cat(values))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input` with the gradient of `roi_align_forward` with respect to its input; arguments as there."""
    gradient = computable(grad_output)
    regions = rois.to(gradient.dtype)
    if pool_mode == AVERAGE:
        sizes = (*grad_input.shape, sampling_ratio, aligned)
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                gradient, regions, spatial_scale, aligned_height, aligned_width, *sizes
            )
        )
        return
    height, width = grad_input.shape[2:]
    ys, xs = argmax_y.to(gradient.dtype), argmax_x.to(gradient.dtype)
    gradient = gradient * ((ys != -1) | (xs != -1))
    total = torch.zeros_like(grad_input, dtype=gradient.dtype)
    for row, weight_y in neighbours(ys, height):
        for column, weight_x in neighbours(xs, width):
            values = gradient * weight_y * weight_x
            total += scattered(grad_input.shape, regions[:, 0].long(), row * width + column, values)
    grad_input.copy_(total)


def _largest(
    rows: Tensor, regions: Tensor, shape: tuple[int, ...], scale: float, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest sample of each bin with its row and column; a bin without samples has 0 and -1.

    Args:
        rows: B*H*W x C.
        regions: N x 5.
        shape: H and W of the map, bins down and across.
        scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).
        aligned: whether pixel centres lie at +0.5.

    Returns:
        Each N C and bins.
    """
    bins = shape[2:]
    x1, y1, x2, y2 = (regions[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = height.clamp(min=1), width.clamp(min=1)
    bag, down, across, _, counts = bin_samples(height, width, bins, sampling_ratio)
    region = bag // (bins[0] * bins[1])
    y, x = y1[region] + down, x1[region] + across
    pixels, weights = bilinear(regions[:, 0].long()[region], y, x, *shape[:2])
    samples = bag_sums(rows, pixels.flatten(), weights.flatten(), torch.full_like(bag, 4))
    largest, place = bag_maxima(samples, torch.arange(len(bag), device=bag.device), counts)
    place = place.masked_fill((counts == 0)[:, None], len(bag))  # to the -1 after the last sample
    ys, xs = (pad(axis, (0, 1), value=-1)[place] for axis in (y, x))
    return bins_first(largest, bins), bins_first(ys, bins), bins_first(xs, bins)

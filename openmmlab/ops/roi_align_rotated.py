"""RoIAlign for rotated regions: the mean of bilinear samples in each bin."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable, gradients
from terrazzo.openmmlab.ops._pixels import bag_sums, bilinear, bin_samples, bins_first, pixel_rows


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Fills `output` with the pooled features of each region.

    Args:
        input: B C H W.
        rois: N x 6, as index in the batch, centre x and y, width, height in image pixels, angle in radians.
        output: N C pooled_height pooled_width, filled in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).
        aligned: whether pixel centres lie at +0.5; if not, regions are at least one pixel wide and high.
        clockwise: whether positive angles turn clockwise on the screen.
    """
    bins = (pooled_height, pooled_width)
    output.copy_(rotated_pool(computable(input), rois, bins, spatial_scale, sampling_ratio, aligned, clockwise))


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Fills `grad_input` with the gradient of `roi_align_rotated_forward` with respect to its input."""
    bins = (pooled_height, pooled_width)
    (gradient,) = gradients(
        lambda features: rotated_pool(features, rois, bins, spatial_scale, sampling_ratio, aligned, clockwise),
        (torch.zeros_like(computable(grad_input)),),  # pooling is linear: its gradient is the same at every input
        grad_output,
    )
    grad_input.copy_(gradient)


def rotated_pool(
    features: Tensor,
    rois: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Tensor:
    """The pooled features, N C and bins, differentiable in `features`; arguments as `roi_align_rotated_forward`."""
    regions = computable(rois)
    shift = 0.5 if aligned else 0.0
    centre_x, centre_y = regions[:, 1] * spatial_scale - shift, regions[:, 2] * spatial_scale - shift
    width, height = regions[:, 3] * spatial_scale, regions[:, 4] * spatial_scale
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    angle = -regions[:, 5] if clockwise else regions[:, 5]
    bag, down, across, share, counts = bin_samples(height, width, bins, sampling_ratio)
    region = bag // (bins[0] * bins[1])
    down, across = down - height[region] / 2, across - width[region] / 2
    cosine, sine = angle.cos()[region], angle.sin()[region]
    y = down * cosine - across * sine + centre_y[region]
    x = down * sine + across * cosine + centre_x[region]
    pixels, weights = bilinear(regions[:, 0].long()[region], y, x, *features.shape[2:])
    sums = bag_sums(pixel_rows(features), pixels.flatten(), (weights * share[:, None]).flatten(), 4 * counts)
    return bins_first(sums, bins)

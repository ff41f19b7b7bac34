"""Deformable RoI pooling (Dai et al., 2017, section 2.2): RoIAlign with bins that learned offsets shift."""

from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable, gradients
from terrazzo.openmmlab.ops._pixels import bag_sums, bilinear, bin_samples, bins_first, pixel_rows


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fills `output` with the mean of bilinear samples in each bin.

    Args:
        input: B C H W.
        rois: N x 5, as index in the batch, x1 y1 x2 y2 in image pixels.
        offset: N 2 pooled_height pooled_width, shifts across and down as shares of the region's width and height; or
            empty for none.
        output: N C pooled_height pooled_width, filled in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).
        gamma: factor of the offsets.
    """
    bins = (pooled_height, pooled_width)
    features, shifts = computable(input), computable(offset)
    output.copy_(_pool(features, shifts, rois, bins, spatial_scale, sampling_ratio, gamma))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fills `grad_input` and `grad_offset` with the gradients of `deform_roi_pool_forward`; arguments as there."""
    bins = (pooled_height, pooled_width)
    of_input, of_offset = gradients(
        lambda features, shifts: _pool(features, shifts, rois, bins, spatial_scale, sampling_ratio, gamma),
        (computable(input), computable(offset)),
        grad_output,
    )
    grad_input.copy_(of_input)
    grad_offset.copy_(of_offset)


def _pool(
    features: Tensor,
    offset: Tensor,
    rois: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    regions = computable(rois)
    x1, y1, x2, y2 = (regions[:, 1:] * spatial_scale - 0.5).unbind(1)
    width, height = x2 - x1, y2 - y1
    bag, down, across, share, counts = bin_samples(height, width, bins, sampling_ratio)
    region = bag // (bins[0] * bins[1])
    y, x = y1[region] + down, x1[region] + across
    if offset.numel():
        shift_x, shift_y = offset.flatten(2).unbind(1)  # N bins
        x = x + gamma * width[region] * shift_x.flatten()[bag]
        y = y + gamma * height[region] * shift_y.flatten()[bag]
    pixels, weights = bilinear(regions[:, 0].long()[region], y, x, *features.shape[2:])
    sums = bag_sums(pixel_rows(features), pixels.flatten(), (weights * share[:, None]).flatten(), 4 * counts)
    return bins_first(sums, bins)

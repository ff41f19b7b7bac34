"""Rotation-invariant RoIAlign (Han et al., ReDet, 2021, section 4.2): rotated regions, turned channels."""

import math

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import computable, gradients
from terrazzo.openmmlab.ops.roi_align_rotated import rotated_pool


def riroi_align_rotated_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """Fills `output` with the pooled features of each region, as though the region's angle were zero.

    Args:
        features: B C H W, where orientation is the fastest axis of C.
        rois: N x 6, as index in the batch, centre x and y, width, height in image pixels, angle in radians.
        output: N C pooled_height pooled_width, filled in place.
        pooled_height: bins down.
        pooled_width: bins across.
        spatial_scale: map pixels per image pixel.
        num_samples: samples per bin and axis; 0 takes ceil(bin size).
        num_orientations: orientations in C.
        clockwise: whether positive angles turn clockwise on the screen.
    """
    bins = (pooled_height, pooled_width)
    output.copy_(_pool(computable(features), rois, bins, spatial_scale, num_samples, num_orientations, clockwise))


def riroi_align_rotated_backward(
    top_grad: Tensor,
    rois: Tensor,
    bottom_grad: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> None:
    """Fills `bottom_grad` with the gradient of `riroi_align_rotated_forward` with respect to its features."""
    bins = (pooled_height, pooled_width)
    (gradient,) = gradients(
        lambda features: _pool(features, rois, bins, spatial_scale, num_samples, num_orientations, clockwise),
        (torch.zeros_like(computable(bottom_grad)),),  # linear: its gradient is the same at every input
        top_grad,
    )
    bottom_grad.copy_(gradient)


def _pool(
    features: Tensor,
    rois: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    num_samples: int,
    num_orientations: int,
    clockwise: bool,
) -> Tensor:
    pooled = rotated_pool(features, rois, bins, spatial_scale, num_samples, False, clockwise)
    pooled = pooled.unflatten(1, (-1, num_orientations))  # N C/orientations orientations h w
    steps = computable(rois)[:, 5] * num_orientations / (2 * math.pi)
    whole = steps.floor()
    fraction = (steps - whole).view(-1, 1, 1, 1, 1)
    source = torch.arange(num_orientations, device=rois.device) - whole.long()[:, None]  # N orientations
    lower, upper = (
        pooled.gather(2, (place % num_orientations)[:, None, :, None, None].expand_as(pooled))
        for place in (source, source + 1)
    )
    return ((1 - fraction) * lower + fraction * upper).flatten(1, 2)

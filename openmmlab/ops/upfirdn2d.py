"""Upsampling by zeros, padding, filtering and downsampling of images in one (Karras et al., 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single


def upfirdn2d(
    input: Tensor,
    filter: Tensor,
    upx: int,
    upy: int,
    downx: int,
    downy: int,
    padx0: int,
    padx1: int,
    pady0: int,
    pady1: int,
    flip: bool,
    gain: float,
) -> Tensor:
    """The resampled images.

    Args:
        input: B C H W.
        filter: rows x columns.
        upx: each pixel becomes itself and upx - 1 zeros, across.
        upy: the same down.
        downx: every downx-th pixel is kept, across.
        downy: the same down.
        padx0: zeros added at the left of the upsampled image; if negative, pixels are cut off.
        padx1: at the right.
        pady0: at the top.
        pady1: at the bottom.
        flip: whether the filter is correlated with the image, rather than convolved.
        gain: a factor on the result.
    """
    images, taps = at_least_single(input, filter)
    taps = taps if flip else taps.flip(0, 1)
    batch, channels, height, width = images.shape
    spread = images.new_zeros(batch * channels, 1, height, upy, width, upx)
    spread[:, :, :, 0, :, 0] = images.flatten(0, 1)[:, None]
    padded = F.pad(spread.flatten(4, 5).flatten(2, 3), (padx0, padx1, pady0, pady1))
    # Autocast would compute the convolution in 16 bits.
    with torch.autocast(input.device.type, enabled=False):
        filtered = F.conv2d(padded, (taps * gain)[None, None], stride=(downy, downx))
    return filtered.unflatten(0, (batch, channels))[:, :, 0].to(input.dtype)

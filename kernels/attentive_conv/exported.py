"""Attentive convolution as an exporter traces it, for fixed or open sizes.

One product pools, and the convolution is a sum of shifted slices, because TensorRT does not take a convolution with a
computed weight.
"""

import math

import torch
import torch.nn.functional as F

from terrazzo.kernels.attentive_conv.portable import generate, project, sequence
from terrazzo.kernels.dispatch.dtypes import accumulator


def _bin_weights(length: int, taps: int, like: torch.Tensor) -> torch.Tensor:
    """(taps, L): the weight of each position in each bin's mean, in operations that also take a symbolic length.

    Position l belongs to bin t if the intervals [l, l + 1) / length and [t, t + 1) / taps overlap.
    """
    position = taps * torch.arange(length, device=like.device)
    number = length * torch.arange(taps, device=like.device)[:, None]
    inside = ((position + taps > number) & (position < number + length)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def forward(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> torch.Tensor:
    """Attentive convolution; arguments and result as in `reference.attentive_conv`."""
    taps = len(mixing)
    side = math.isqrt(taps)
    height, width = value.shape[2:]
    x = sequence(x).to(accumulator(x))
    pooled = _bin_weights(x.shape[1], taps, x) @ x
    kernels = generate(project(pooled, weight, bias), mixing, mixing_bias, inhibition).to(value.dtype)[..., None, None]
    padded = F.pad(value, (side // 2,) * 4)
    out = 0
    for down in range(side):
        rows = padded[:, :, down : down + height]
        for right in range(side):
            out = out + rows[..., right : right + width] * kernels[:, down * side + right]
    return out

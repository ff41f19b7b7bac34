"""Attentive convolution and the layers of PyTorch that compute it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import attentive_conv
from terrazzo.tools.bench.operators.operator import Operator

_TAPS = 9


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """The operator's inputs; maps are channels last, as a layer norm leaves them."""
    batch, channels, height, width = sizes
    scales = {(channels, channels): channels**-0.5, (_TAPS, _TAPS): _TAPS**-0.5}
    shapes = ((channels, channels), (channels,), (_TAPS, _TAPS), (_TAPS,), (channels,))
    maps = [torch.randn(batch, height, width, channels, device=device).permute(0, 3, 1, 2) for _ in range(2)]
    return maps + [torch.randn(shape, device=device) * scales.get(shape, 1) for shape in shapes]


def plain(x, value, weight, bias, mixing, mixing_bias, inhibition) -> torch.Tensor:
    """The code of a user without the operator, and of the authors.

    The whole map is projected and pooled as a sequence; one convolution has a group for each channel of each image.
    """
    batch, channels, height, width = value.shape
    side = math.isqrt(len(mixing))
    pooled = F.adaptive_avg_pool1d(F.conv2d(x, weight[..., None, None], bias).flatten(2), side * side)
    kernels = F.linear(F.gelu(pooled), mixing, mixing_bias)
    kernels = kernels - inhibition.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
    kernels = kernels.reshape(-1, 1, side, side).to(value.dtype)
    value = value.reshape(1, -1, height, width)
    out = F.conv2d(value, kernels, padding=side // 2, groups=batch * channels)
    return out.view(batch, channels, height, width)


ATTENTIVE_CONV = Operator(
    name="attentive_conv",
    run=attentive_conv,
    peers={"plain": plain},
    compiled={"plain": lambda: torch.compile(plain, dynamic=False)},
    variant="3x3",
    axes="B x C x H x W",
    arguments=("x", "value", "weight", "bias", "mixing", "mixing_bias", "inhibition"),
    inputs=inputs,
    # The four stages of AttNet-XXS at 224, and three of its stages and one of AttNet-T2 at larger sizes.
    at_224=((32, 56, 56), (64, 28, 28), (128, 14, 14), (240, 7, 7)),
    larger=((32, 128, 128), (64, 64, 64), (32, 200, 336), (64, 200, 336)),
)

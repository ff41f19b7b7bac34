"""The small map that RGT's global attention reads: one strided convolution, applied again and again.

Paper: Recursive Generalization Transformer for Image Super-Resolution, ICLR 2024, arXiv 2303.06373, section 3.
"""

import torch
from torch import nn

from terrazzo.backbones._layers import on_maps

STRIDE = 4
"""Of one recursion, along each side."""


def power_below(number: int) -> int:
    """The largest p with 4^p <= number, 0 for numbers below 4; for symbolic sizes, too.

    The authors take a logarithm of floats. A loop needs no rounding, and compiled models run again for other sizes
    without a size of their own.
    """
    power = 0
    while STRIDE ** (power + 1) <= number:
        power += 1
    return power


def recursions_of(grid: tuple[int, int], training: bool) -> int:
    """How often the authors' code reduces a map; another number in training than in evaluation.

    They train with maps of 64 x 64, which are reduced twice in both. The number is never larger than the shorter side
    of the map allows, where the authors' code fails.

    Source: arXiv 2303.06373, section 3, and the authors' code.
    """
    longer, shorter = max(grid), min(grid)
    times = power_below(longer // 4) if training else max(2, power_below(longer // 16))
    return min(times, power_below(shorter))


class Generalization(nn.Module):
    """A map (B, H, W, C) to tokens (B, h w, c) that summarise it, with h = floor(H / 4^T) and w = floor(W / 4^T).

    T times the same depthwise convolution, which reduces both sides by 4, then a depthwise and a pointwise convolution,
    a norm and GELU. Rows and columns that fill no whole cell are not read.
    """

    def __init__(self, dim: int, out_dim: int, **factory):
        super().__init__()
        self.reduction1 = nn.Conv2d(dim, dim, STRIDE, stride=STRIDE, groups=dim, **factory)
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.conv = nn.Conv2d(dim, out_dim, 1, **factory)
        self.norm_act = nn.Sequential(nn.LayerNorm(out_dim, **factory), nn.GELU())

    def summary(self, x: torch.Tensor, times: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """The tokens after `times` recursions, and h and w."""
        z = on_maps(x, *[self.reduction1] * times, self.dwconv, self.conv)
        return self.norm_act(z.flatten(1, 2)), tuple(z.shape[1:3])

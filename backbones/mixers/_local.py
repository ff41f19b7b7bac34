"""A local branch that several mixers add: a depthwise convolution of the values of the patches."""

import torch
import torch.nn.functional as F

from terrazzo.backbones._place import Place


def depthwise(
    value: torch.Tensor, place: Place, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve values (B, heads, N, D) as a map with heads D channels; the result is 0 for the tokens in front.

    Args:
        weight: (heads D, 1, k, k) with odd k; the map is padded with zeros.
        bias: (heads D,), or None.
    """
    heads, dim = value.shape[1], value.shape[3]
    maps = value[:, :, place.prefix :].transpose(2, 3).flatten(1, 2).unflatten(2, place.grid)
    bias = None if bias is None else bias.to(value.dtype)
    out = F.conv2d(maps, weight.to(value.dtype), bias, padding=weight.shape[-1] // 2, groups=heads * dim)
    return F.pad(out.flatten(2).unflatten(1, (heads, dim)).transpose(2, 3), (0, 0, place.prefix, 0))

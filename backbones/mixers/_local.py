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
    # Hosts have the channels of a token side by side, so the map is a channels_last one without a copy.
    patches = value[:, :, place.prefix :].transpose(1, 2).flatten(2)
    maps = patches.transpose(1, 2).unflatten(2, place.grid)
    bias = None if bias is None else bias.to(value.dtype)
    out = F.conv2d(maps, weight.to(value.dtype), bias, padding=weight.shape[-1] // 2, groups=heads * dim)
    out = out.flatten(2).transpose(1, 2).unflatten(2, (heads, dim)).transpose(1, 2)
    return F.pad(out, (0, 0, place.prefix, 0))

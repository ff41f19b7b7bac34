"""Attentive convolution by its definition, in the authors' order: project, then pool. It is authoritative.

Source: Attentive Convolution, arXiv 2510.20092, with the pooling of the released code: over the flattened map.
"""

import math

import torch
import torch.nn.functional as F


def bins(length: int, count: int) -> list[tuple[int, int]]:
    """First and last + 1 position of each of `count` bins over `length` positions, as in adaptive average pooling.

    If `count` does not divide the length, neighbouring bins share a position. Below `count` positions bins repeat.
    """
    return [(number * length // count, -(-(number + 1) * length // count)) for number in range(count)]


def kernels_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> torch.Tensor:
    """The kernels of each sample and channel, (B, C, taps)."""
    projected = torch.einsum("oc,bcl->bol", weight, x.flatten(2)) + bias[:, None]
    pooled = [projected[..., first:last].mean(-1) for first, last in bins(projected.shape[-1], len(mixing))]
    kernels = F.linear(F.gelu(torch.stack(pooled, -1)), mixing, mixing_bias)
    return kernels - inhibition.sigmoid()[:, None] * kernels.mean(-1, keepdim=True)


def attentive_conv(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> torch.Tensor:
    """Depthwise convolution with separate kernels for each sample.

    Args:
        x, value: (B, C, H, W), any floating dtype.
        weight, bias: (C, C) and (C,), the projection of `x` before it is pooled.
        mixing, mixing_bias: (taps, taps) and (taps,), from the pooled bins of a channel to its kernel.
        inhibition: (C,), logits of the share of its mean that is subtracted from a kernel.

    Returns:
        (B, C, H, W) in the dtype of `value`. Memory: `taps` times `value`.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    kernels = kernels_of(*(part.to(dtype) for part in (x, weight, bias, mixing, mixing_bias, inhibition)))
    side = math.isqrt(kernels.shape[-1])
    windows = F.unfold(value, side, padding=side // 2).unflatten(1, kernels.shape[1:])  # B C taps L
    return torch.einsum("bctl,bct->bcl", windows, kernels.to(value.dtype)).view(value.shape)

"""Attentive convolution in standard PyTorch operations, and its gradients.

Pooling is linear and its weights sum to one, so it goes before the projection: `taps` columns are projected, not the
whole map. Everything from the means to the kernels is computed in float32 at least, and has the shape (B, taps, C).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from terrazzo.kernels.attentive_conv.reference import bins
from terrazzo.kernels.dispatch.dtypes import accumulator


def sequence(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as (B, L, C), in raster order; a view."""
    return x.flatten(2).transpose(1, 2)


def _pool(x: torch.Tensor, taps: int) -> torch.Tensor:
    x = sequence(x)
    means = [x[:, first:last].mean(1, dtype=accumulator(x)) for first, last in bins(x.shape[1], taps)]
    return torch.stack(means, 1)


def project(pooled: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(pooled, weight.to(pooled.dtype), bias.to(pooled.dtype))


def _mix(projected: torch.Tensor, mixing: torch.Tensor, mixing_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activations of the bins, and the kernels before inhibition."""
    active = F.gelu(projected)
    return active, mixing.to(projected.dtype) @ active + mixing_bias.to(projected.dtype)[:, None]


def generate(
    projected: torch.Tensor, mixing: torch.Tensor, mixing_bias: torch.Tensor, inhibition: torch.Tensor
) -> torch.Tensor:
    """The kernels from the projected means, both (B, taps, C)."""
    _, raw = _mix(projected, mixing, mixing_bias)
    return raw - inhibition.to(raw.dtype).sigmoid() * raw.mean(1, keepdim=True)


def _as_groups(value: torch.Tensor, kernels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Input, weight and number of groups of a single convolution over the channels of all samples."""
    batch, taps, channels = kernels.shape
    side = math.isqrt(taps)
    groups = batch * channels
    weight = kernels.transpose(1, 2).reshape(groups, 1, side, side).to(value.dtype)
    return value.reshape(1, groups, *value.shape[2:]), weight, groups


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Make the channels of (B, C, H, W) contiguous, even if a size of 1 leaves PyTorch a choice of strides."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def forward(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attentive convolution of real tensors; arguments as in `reference.attentive_conv`.

    Returns:
        out: (B, C, H, W), channels last.
        pooled, projected, kernels: (B, taps, C), for `backward`.
    """
    pooled = _pool(x, len(mixing))
    projected = project(pooled, weight, bias)
    kernels = generate(projected, mixing, mixing_bias, inhibition)
    grouped, kernel, groups = _as_groups(value, kernels)
    out = F.conv2d(grouped, kernel, padding=kernel.shape[-1] // 2, groups=groups)
    return channels_last(out.view(value.shape)), pooled, projected, kernels


def convolution_gradients(
    grad: torch.Tensor, value: torch.Tensor, kernels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the value (channels last) and of the kernels. Half precision is computed in float32."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    grouped, kernel, groups = _as_groups(value.to(dtype), kernels)
    padding = kernel.shape[-1] // 2
    grad_value, grad_kernels, _ = torch.ops.aten.convolution_backward(
        grad.to(dtype).reshape(grouped.shape),
        grouped,
        kernel,
        None,
        [1, 1],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        groups,
        [True, True, False],
    )
    batch, taps, channels = kernels.shape
    grad_kernels = grad_kernels.view(batch, channels, taps).transpose(1, 2).to(kernels.dtype)
    return channels_last(grad_value.view(value.shape).to(value.dtype)), grad_kernels


def projection_gradients(
    grad_projected: torch.Tensor, pooled: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the pooled means, of the weight and of the bias."""
    grad_pooled = grad_projected @ weight.to(pooled.dtype)
    return grad_pooled, grad_projected.flatten(0, 1).t() @ pooled.flatten(0, 1), grad_projected.sum((0, 1))


def spread(grad_pooled: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The gradient of the map (B, C, H, W), channels last, from the gradients of the bins' means (B, taps, C)."""
    batch, taps, channels = grad_pooled.shape
    out = grad_pooled.new_zeros(batch, size[0] * size[1], channels)
    for number, (first, last) in enumerate(bins(size[0] * size[1], taps)):
        out[:, first:last] += (grad_pooled[:, number] / (last - first))[:, None]
    return out.to(dtype).view(batch, *size, channels).permute(0, 3, 1, 2)


def backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    pooled: torch.Tensor,
    projected: torch.Tensor,
    kernels: torch.Tensor,
    weight: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
    x_dtype: torch.dtype,
    convolution_gradients: Callable = convolution_gradients,
    spread: Callable = spread,
) -> tuple[torch.Tensor, ...]:
    """Gradients of all arguments of `forward`, given its outputs. Weights get gradients in float32 at least.

    Args:
        convolution_gradients, spread: what computes with whole maps.
    """
    taps = len(mixing)
    grad_value, grad_kernels = convolution_gradients(grad, value, kernels)
    active, raw = _mix(projected, mixing, mixing_bias)
    share = inhibition.to(raw.dtype).sigmoid()
    lost = grad_kernels.sum(1)
    grad_inhibition = -share * (1 - share) * (raw.mean(1) * lost).sum(0)
    grad_raw = grad_kernels - (share * lost / taps)[:, None]
    grad_active = mixing.to(raw.dtype).t() @ grad_raw
    grad_projected = torch.ops.aten.gelu_backward(grad_active, projected)
    grad_pooled, grad_weight, grad_bias = projection_gradients(grad_projected, pooled, weight)
    grad_x = spread(grad_pooled, value.shape[2:], x_dtype)
    grad_mixing = torch.einsum("bsc,btc->st", grad_raw, active)
    return grad_x, grad_value, grad_weight, grad_bias, grad_mixing, grad_raw.sum((0, 2)), grad_inhibition

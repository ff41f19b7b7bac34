"""Attentive convolution in Numba, for CPUs: what the kernels are given, and how a call is divided.

The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at the first call. PyTorch computes what
is small: projections and mixing of the bins. A call is divided by its sizes alone, never by the number of threads, so
the same call gives the same bits.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from terrazzo.kernels.attentive_conv import portable
from terrazzo.kernels.attentive_conv.reference import bins
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of
from terrazzo.kernels.numba_host.fused_constants import LANES

# The most positions that are added up one after another.
SPLIT = 256
# Numbers of maps in a call of a kernel, so that the call itself costs little, and the most calls.
_WORK, _CALLS = 1 << 17, 256


def _divided(kernel: Callable, units: int, work: int, *arguments) -> None:
    calls = max(1, min(units, work // _WORK, _CALLS))
    threads.run(lambda i: kernel(*arguments, units * i // calls, units * (i + 1) // calls), calls)


def _map(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W) as a contiguous (B, H, W, C) with whole vectors of channels; a channels-last map is not copied."""
    return _padded(x.permute(0, 2, 3, 1).to(dtype)).contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, -x.shape[-1] % LANES)) if x.shape[-1] % LANES else x


def _flat(x: torch.Tensor) -> np.ndarray:
    return array_of(x.reshape(-1))


def _restored(x: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_map`: (B, C, H, W), channels last."""
    return x[..., :channels].to(dtype).contiguous().permute(0, 3, 1, 2)


def _pool(x: torch.Tensor, taps: int) -> torch.Tensor:
    """Means of bins, (B, taps, C)."""
    from terrazzo.kernels.attentive_conv import fused_cpu_kernels as kernels

    real, x = x.shape[1], _map(x, accumulator(x))
    batch, height, width, channels = x.shape
    cuts = bins(height * width, taps)
    splits = max(-(-(last - first) // SPLIT) for first, last in cuts)
    sums = x.new_empty(batch, taps, splits, channels)
    one = np.ones(LANES, array_of(x).dtype)
    given = (_flat(x), np.array(cuts), splits, one, channels, height * width, _flat(sums))
    _divided(kernels.pool, batch * taps * splits, x.numel(), *given)
    counts = torch.tensor([last - first for first, last in cuts], dtype=x.dtype)
    return (sums.squeeze(2) if splits == 1 else sums.sum(2))[..., :real] / counts[:, None]


def _convolve(value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Convolution of a map (B, H, W, C) with the kernels (B, taps, C) of each image."""
    from terrazzo.kernels.attentive_conv import fused_cpu_kernels as kernels

    out = torch.empty_like(value)
    given = (_flat(value), _flat(_padded(weights).contiguous()), math.isqrt(weights.shape[1]), tuple(value.shape[1:]))
    _divided(kernels.convolve, value.shape[0] * value.shape[1], value.numel(), *given, _flat(out))
    return out


def forward(
    x: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mixing: torch.Tensor,
    mixing_bias: torch.Tensor,
    inhibition: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attentive convolution; arguments and results as in `portable.forward`."""
    pooled = _pool(x, len(mixing))
    projected = portable.project(pooled, weight, bias)
    kernels = portable.generate(projected, mixing, mixing_bias, inhibition)
    dtype = accumulator(value)
    out = _convolve(_map(value, dtype), kernels.to(dtype))
    return _restored(out, value.shape[1], value.dtype), pooled, projected, kernels


def _convolution_gradients(
    grad: torch.Tensor, value: torch.Tensor, kernels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `portable.convolution_gradients`."""
    from terrazzo.kernels.attentive_conv import fused_cpu_kernels

    dtype, channels = accumulator(value), value.shape[1]
    grad, value_dtype, value = _map(grad, dtype), value.dtype, _map(value, dtype)
    # The gradient of a convolution with zeros around the map is one with the turned kernels.
    grad_value = _convolve(grad, kernels.to(dtype).flip(1))
    batch, height, _, wide = value.shape
    taps = kernels.shape[1]
    by_rows = value.new_empty(batch, height, taps, wide)
    given = (_flat(grad), _flat(value), math.isqrt(taps), tuple(value.shape[1:]), _flat(by_rows))
    _divided(fused_cpu_kernels.correlate, batch * height, value.numel(), *given)
    return _restored(grad_value, channels, value_dtype), by_rows.sum(1)[..., :channels].to(kernels.dtype)


def _spread(grad_pooled: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Like `portable.spread`."""
    from terrazzo.kernels.attentive_conv import fused_cpu_kernels as kernels

    batch, taps, channels = grad_pooled.shape
    cuts = bins(size[0] * size[1], taps)
    counts = torch.tensor([last - first for first, last in cuts], dtype=grad_pooled.dtype)
    of_means = _padded(grad_pooled / counts[:, None]).contiguous()
    out = of_means.new_empty(batch, *size, of_means.shape[2])
    given = (_flat(of_means), np.array(cuts), tuple(out.shape[1:]), _flat(out))
    _divided(kernels.spread, batch * size[0], out.numel(), *given)
    return _restored(out, channels, dtype)


def backward(*arguments) -> tuple[torch.Tensor, ...]:
    """Gradients; arguments and results as in `portable.backward`."""
    return portable.backward(*arguments, convolution_gradients=_convolution_gradients, spread=_spread)

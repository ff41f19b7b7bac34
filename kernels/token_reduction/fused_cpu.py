"""Token reduction in Numba, for CPUs: what the kernels are given, and how a call is divided.

Products of matrices are PyTorch's. The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at
the first call. Plans are in fused_cpu_plan.py. A call is divided by its sizes alone, never by the number of threads, so
the same call gives the same bits.
"""

import math
from collections.abc import Callable, Sequence

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host.arrays import array_of
from terrazzo.kernels.token_reduction.fused_cpu_parts import PARTS, divided, is_small
from terrazzo.kernels.token_reduction.fused_cpu_plan import plan
from terrazzo.kernels.token_reduction.portable import by_tiles, is_whole

__all__ = ["attend", "column_mean", "plan", "pool", "pool_backward", "weights"]

# Numbers that are exponentiated at once, and queries of a partial sum of columns.
WIDTH = 32
ROWS = 32
# Channels of a pooled image at a time.
_CHANNELS = 128
# Products of an image with fewer multiplications are computed for all images at once.
_FEW = 1 << 21


def _check_groups(right: Sequence[bool], count: int) -> None:
    if not all(right):
        raise InputError(f"the map must have numbers from 0 to {count - 1}; make it by `plan`, or see `existing`")


def pool(
    x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor, size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted means of groups, like `portable.pool`.

    Args:
        weight, size: (B, N) in the dtype of the sums.

    Returns:
        The means (B, count, C) in the dtype of x, the sums of sizes and the sums of weights, (B, count).
    """
    from terrazzo.kernels.token_reduction import fused_cpu_kernels as kernels

    given = [t.contiguous() for t in (x.to(weight.dtype), assignment, weight, size)]
    batch, _, channels = x.shape
    out = weight.new_empty(batch, count, channels)
    found, total = (weight.new_empty(batch, count) for _ in range(2))
    arrays = [array_of(t) for t in (*given, out, found, total)]
    _check_groups(_by_channels(kernels.pool, arrays, batch, channels, x.numel() + out.numel()), count)
    return out.to(x.dtype), found, total


def pool_backward(
    grad: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, given the gradient of the means and the sums of weights."""
    from terrazzo.kernels.token_reduction import fused_cpu_kernels as kernels

    given = [t.contiguous() for t in (grad.to(weight.dtype), assignment, weight, total)]
    batch, count, channels = grad.shape
    out = weight.new_empty(*assignment.shape, channels)
    arrays = [array_of(t) for t in (*given, out)]
    _check_groups(_by_channels(kernels.spread, arrays, batch, channels, grad.numel() + out.numel()), count)
    return out.to(grad.dtype)


def _by_channels(kernel: Callable[..., bool], arrays: Sequence, batch: int, channels: int, work: int) -> list[bool]:
    """Divide a call by images; few images of many tokens also by channels."""
    if batch >= PARTS or is_small(work):
        return divided(lambda *part: kernel(*arrays, *part, 0, channels), batch, work)
    blocks = -(-channels // _CHANNELS)

    def block(begin: int, end: int) -> bool:
        right = True
        for i in range(begin, end):
            image, first = i // blocks, i % blocks * _CHANNELS
            right &= kernel(*arrays, image, image + 1, first, min(first + _CHANNELS, channels))
        return right

    return divided(block, batch * blocks, work)


def _weights_and_sums(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights (B, H, queries, keys), and the sums of each key's weights over queries, (B, H, keys)."""
    from terrazzo.kernels.token_reduction import fused_cpu_kernels as kernels

    dtype = accumulator(query)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    scores = query.new_empty(batch, heads, queries, keys)
    _multiply(query, key.transpose(-1, -2), scores)
    scores = scores.to(dtype)
    bias = scores.new_empty(0, keys) if bias is None else bias.to(dtype).contiguous()
    sums = scores.new_empty(batch, heads, keys)
    given = (array_of(scores), array_of(bias), 1 / math.sqrt(query.shape[-1]), array_of(sums))
    divided(lambda *part: kernels.softmax(*given, *part), batch * heads, 2 * scores.numel())
    return scores, sums


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Products of matrices, (B, H, M, K) and (B, H, K, N) to `out`; heads may stand side by side in the channels.

    PyTorch would copy heads of several images that stand side by side, but not the heads of one image.
    """
    if len(out) > 1 and out[0].numel() * left.shape[3] < _FEW:
        out.copy_(left @ right)
        return
    for a, b, c in zip(left, right, out):
        torch.bmm(a, b, out=c)


def attend(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output of attention (B, H, N, D), whose heads stand side by side in memory, (B, N, H, D)."""
    batch, heads, count, width = value.shape
    out = value.new_empty(batch, count, heads, width).transpose(1, 2)
    _multiply(weights.to(value.dtype), value, out)
    return out


def weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights (B, H, N, N), and their mean over heads and queries, (B, N)."""
    found, sums = _weights_and_sums(query, key, bias)
    return found, sums.sum(1) / (query.shape[1] * query.shape[2])


def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Like `portable.column_mean`."""
    if is_whole(query):
        return weights(query, key, bias)[1]
    return by_tiles(lambda *tile: _weights_and_sums(*tile)[1].sum(1), query, key, bias)

"""Neighborhood attention in Numba, for CPUs: what the kernels are given, and how a call is divided.

The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at the first call. A call is divided by
its sizes alone, never by the number of threads, so the same call gives the same bits.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of, rows_of
from terrazzo.kernels.numba_host.fused_constants import LANES, LOG2_E

# Rows of keys, and vectors of channels, whose sums are in registers at once.
_ROWS, _VECTORS = (7, 5, 3, 1), (4, 2, 1)
# The most rows and columns of a tile: its keys and values stay in the caches. In the backward pass neighbouring tiles
# compute the same weights, so its tiles are larger.
_TILE, _BACK_TILE = (16, 64), (28, 64)
# Products of a call of a kernel, so that the call itself costs little, and the most calls.
_WORK, _CALLS = 1 << 20, 256
# The most bytes for partial sums of the bias' gradient.
_PARTIAL_BYTES = 64 << 20

# Keys of a window from which the kernels are faster on no map.
_LARGE_WINDOW = 256


def can_differentiate(kernel_size: tuple[int, int]) -> bool:
    """Whether `backward` covers the call. It keeps the weights of all queries of a tile."""
    return math.prod(kernel_size) <= _LARGE_WINDOW


def slow(size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]) -> str | None:
    """Why the portable form is faster on a map, or None if it is not.

    The portable form multiplies whole tiles. That wastes little if most keys of a tile are in most windows (README.md).
    """
    window = math.prod(kernel_size)
    if window > _LARGE_WINDOW or size[0] * size[1] < 2 * window * math.prod(dilation):
        return f"takes longer than matrix products of whole tiles where most keys are in most windows of {window} keys"
    return None


class Cut(NamedTuple):
    """How a call is divided: rows and columns of a tile, tiles per axis, and what is in registers at once."""

    band: int
    strip: int
    bands: int
    strips: int
    rows: int
    vectors: int


class _Call:
    """What the kernels take in both directions."""

    def __init__(self, tensors, rpb, kernel_size, dilation, scale, tile):
        dtype = accumulator(tensors[0])
        self.channels = tensors[0].shape[-1]
        self.tensors = [_padded(x.to(dtype)) for x in tensors]
        self.sizes = tuple(self.tensors[0].shape)
        self.window = (*kernel_size, *dilation)
        self.scale = float(scale)
        pitch = -(-kernel_size[1] // LANES) * LANES
        self.bias = torch.empty(0, dtype=dtype)
        self.bias_shape = (self.sizes[3], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1 + pitch)
        if rpb is not None:
            self.bias = F.pad(rpb.to(dtype) * LOG2_E, (0, pitch))
        longest = [-(-length // step) for length, step in zip(self.sizes[1:3], dilation)]
        counts = [-(-length // most) for length, most in zip(longest, tile)]
        self.cut = Cut(
            *(-(-length // count) for length, count in zip(longest, counts)),
            *counts,
            _block(kernel_size[0], _ROWS),
            _block(self.sizes[4] // LANES, _VECTORS),
        )
        self.units = self.sizes[3] * self.sizes[0] * dilation[0] * dilation[1] * counts[0] * counts[1]
        work = self.tensors[0].numel() * kernel_size[0] * kernel_size[1]
        self.calls = max(1, min(self.units, work // _WORK, _CALLS))

    def given(self) -> list:
        """The first arguments of both kernels."""
        arrays, steps = zip(*map(rows_of, self.tensors))
        return [*arrays, steps, array_of(self.bias.flatten()), self.scale, self.sizes, self.window, tuple(self.cut)]

    def empty(self) -> torch.Tensor:
        return torch.empty(self.sizes, dtype=self.tensors[0].dtype)

    def span(self, i: int) -> tuple[int, int]:
        """The units of a call of a kernel."""
        return self.units * i // self.calls, self.units * (i + 1) // self.calls

    def real(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Without the channels that fill up vectors."""
        return x[..., : self.channels].to(dtype).contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With contiguous channels that fill whole vectors."""
    if x.shape[-1] % LANES:
        return F.pad(x, (0, -x.shape[-1] % LANES))
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(count: int, blocks: tuple[int, ...]) -> int:
    """How many sums to compute at once, out of `blocks`, so that `count` sums cost least.

    A block of n sums costs as much as n + 1 sums.
    """
    return min((block for block in blocks if block <= count), key=lambda block: -(-count // block) * (block + 1))


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention on a map; arguments and result as in `reference.neighborhood_attention`."""
    from terrazzo.kernels.neighborhood_attention import fused_cpu_kernels as kernels

    call = _Call((query, key, value), rpb, kernel_size, dilation, scale, _TILE)
    out = call.empty()
    given = [*call.given(), array_of(out.view(-1))]
    threads.run(lambda i: kernels.forward(*given, *call.span(i)), call.calls)
    return call.real(out, query.dtype)


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `forward` with respect to query, key, value and rpb. Only the inputs are kept for it."""
    from terrazzo.kernels.neighborhood_attention import fused_cpu_kernels as kernels

    call = _Call((query, key, value, grad), rpb, kernel_size, dilation, scale, _BACK_TILE)
    grads = [call.empty() for _ in range(3)]
    partial = torch.empty(0, dtype=grads[0].dtype)
    length = math.prod(call.bias_shape)
    if rpb is not None:
        call.calls = max(1, min(call.calls, _PARTIAL_BYTES // (length * partial.itemsize)))
        partial = torch.zeros(call.calls, *call.bias_shape, dtype=partial.dtype)
    given = [*call.given(), *(array_of(x.view(-1)) for x in (*grads, partial))]
    threads.run(lambda i: kernels.backward(*given, i * length, *call.span(i)), call.calls)
    found = [call.real(x, query.dtype) for x in grads]
    if rpb is None:
        return *found, None
    return *found, partial.sum(0)[..., : rpb.shape[-1]].to(rpb.dtype).contiguous()

"""Strip attention in Numba, for CPUs: what the kernels are given, and how a call is divided.

The kernels are in fused_cpu_kernels.py, which imports numba; this file does so at the first call. A call is divided by
its sizes alone, never by the number of threads, so the same call gives the same bits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of, rows_of
from terrazzo.kernels.numba_host.fused_constants import LANES, WIDE

# Keys whose weights stay in the nearest cache, and are added up one after another.
PIECE = 32
# Queries whose gradients of keys and values are added up one after another.
ROWS = 512
# Weights in a call of a kernel, so that the call itself costs little, and the most calls.
_WORK, _CALLS = 1 << 16, 256


def _divided(kernel: Callable[[int, int], None], units: int, work: int) -> None:
    calls = max(1, min(units, work // _WORK, _CALLS))
    threads.run(lambda i: kernel(units * i // calls, units * (i + 1) // calls), calls)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """With contiguous channels that fill whole vectors."""
    if x.shape[-1] % LANES:
        return F.pad(x, (0, -x.shape[-1] % LANES))
    return x if x.stride(-1) == 1 else x.contiguous()


def _restored(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Without the channels that fill up vectors, in the dtype of the call."""
    return x[..., : value.shape[3]].to(value.dtype).contiguous()


class _Call:
    """What the kernels take in both directions."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        self.dtype = accumulator(value)
        self.value = _padded(value.to(self.dtype))
        self.numbers = [x.to(self.dtype).contiguous() for x in (query, key)]
        self.batch, self.keys, self.heads, self.width = self.value.shape
        self.queries = query.shape[1]
        self.sizes = (self.batch, self.queries, self.keys, self.heads, self.width)
        self.items, self.work = self.batch * self.heads, query.numel() * self.keys

    def given(self) -> list:
        lengths = (self.queries, self.keys)
        steps = [(length * self.heads, self.heads, 1) for length in lengths]
        numbers = [x for pair in zip(self.numbers, steps) for x in (array_of(pair[0].view(-1)), pair[1])]
        return [*numbers, *rows_of(self.value)]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strip attention; arguments as in `reference.strip_attention`.

    Returns:
        out: (B, N, heads, D), contiguous.
        sums: empty; the kernels for GPUs need them.
    """
    from terrazzo.kernels.strip_attention import fused_cpu_kernels as kernels

    call = _Call(query, key, value)
    out = call.empty(call.batch, call.queries, call.heads, call.width)
    given = [*call.given(), array_of(out.view(-1)), call.sizes]
    blocks = -(-call.queries // WIDE)
    _divided(lambda *part: kernels.forward(*given, *part), call.items * blocks, call.work)
    return _restored(out, value), query.new_empty(0, dtype=torch.float32)


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to query, key and value. The weights are recomputed; only the inputs are kept."""
    from terrazzo.kernels.strip_attention import fused_cpu_kernels as kernels

    call = _Call(query, key, value)
    grad = _padded(grad.to(call.dtype))
    parts = -(-call.queries // ROWS)
    d_query = call.empty(call.batch, call.queries, call.heads)
    d_key = call.empty(parts, call.batch, call.keys, call.heads)
    d_value = call.empty(*d_key.shape, call.width)
    given = [*rows_of(grad), *call.given(), *(array_of(x.view(-1)) for x in (d_query, d_key, d_value)), call.sizes]
    _divided(lambda *part: kernels.backward(*given, *part), call.items * parts, 3 * call.work)
    d_key, d_value = (x.squeeze(0) if parts == 1 else x.sum(0) for x in (d_key, d_value))
    return d_query.to(value.dtype), d_key.to(value.dtype), _restored(d_value, value)

"""Block-sparse attention in Numba, for CPUs: what the kernel is given, and how a call is divided.

The kernel is in fused_cpu_kernels.py, which imports numba; this file does so at the first call. A call is divided by
its sizes alone, never by the number of threads, so the same call gives the same bits. Where all queries have the same
keys, and for gradients, the portable form's products are large enough for PyTorch's.
"""

import torch

from terrazzo.kernels.block_sparse_attention import portable
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.numba_host import threads
from terrazzo.kernels.numba_host.arrays import array_of, rows_of

# Queries of a tile and listed keys that are multiplied at a time: what they need stays in the nearest caches.
ROWS, PIECE = 64, 64
# Pairs in a call of the kernel, so that the call itself costs little, and the most calls.
_WORK, _CALLS = 1 << 18, 256

backward = portable.backward


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_tile: int,
    key_tile: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one segment; arguments and results as in `portable.forward`."""
    if index is None or index.shape[2] == 1:
        return portable.forward(query, key, value, index, bias, query_tile, key_tile, scale)
    from terrazzo.kernels.block_sparse_attention import fused_cpu_kernels as kernels

    dtype = accumulator(query)
    own_query, own_key, own_value = (_rows(x.to(dtype)) for x in (query, key, value))
    batch, heads, queries, dim = query.shape
    keys, width = value.shape[2:]
    tiles, parts, entries = -(-queries // query_tile), -(-query_tile // ROWS), index.shape[3]
    out, lse = torch.empty(batch, heads, queries, width, dtype=dtype), torch.empty(batch, heads, queries, dtype=dtype)
    own_bias = torch.empty(0, 0, 0, dtype=dtype) if bias is None else bias.to(dtype).contiguous()
    given = [y for x in (own_query, own_key, own_value, index.long().contiguous(), own_bias) for y in rows_of(x)]
    sizes = (heads, queries, keys, dim, width, tiles, entries, query_tile, key_tile, parts)
    results = array_of(out.view(-1)), array_of(lse.view(-1))
    number = array_of(torch.tensor([scale], dtype=dtype))[0]
    units, work = batch * heads * tiles * parts, batch * heads * queries * entries * key_tile
    calls = max(1, min(units, work // _WORK, _CALLS))
    threads.run(
        lambda i: kernels.forward(*given, number, *results, sizes, units * i // calls, units * (i + 1) // calls), calls
    )
    return out.to(query.dtype), lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()

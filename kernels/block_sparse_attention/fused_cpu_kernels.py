"""Block-sparse attention on a CPU: ROWS queries of a tile against PIECE listed keys at a time, with a running softmax.

The keys of a list are copied side by side, whatever their blocks are. The logits of a piece are a product of matrices,
with keys in rows and queries in the lanes of vectors, so the exponentials and their maximum and sum over keys are
vector code. The weights stay in the nearest caches and are multiplied by the values. Numba compiles the kernel at the
first call.
"""

import math

import numpy as np
from numba.extending import register_jitable

from terrazzo.kernels.block_sparse_attention.fused_cpu import PIECE, ROWS
from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES, WIDE
from terrazzo.kernels.numba_host.fused_maths import falling
from terrazzo.kernels.numba_host.fused_products import multiplier
from terrazzo.kernels.numba_host.fused_vectors import larger, load, load_wide, store

_inline = register_jitable(forceinline=True)

# Channels of a key that lie side by side: keys are copied in parts of a constant width.
CHANNELS = 64

# Rows of the product are keys with channels, and queries with weights.
_of_keys, _of_more_keys = multiplier(1, CHANNELS, fresh=True), multiplier(1, CHANNELS)
_to_queries = multiplier(ROWS, 1)


@_inline
def _turned(query, at, step, rows, dim, scale, own):
    """Write `rows` queries times the scale, channels in rows; queries that fill up the tile are 0."""
    own[: dim * ROWS] = 0
    for i in range(rows):
        for c in range(dim):
            own[c * ROWS + i] = query[at + i * step + c] * scale


@_inline
def _copied(x, at, own, to, dim):
    """Copy a row of numbers."""
    wide = dim // WIDE * WIDE
    whole = dim // LANES * LANES
    for c in range(0, wide, WIDE):
        store(own, to + c, load_wide(x, at + c))
    for c in range(wide, whole, LANES):
        store(own, to + c, load(x, at + c))
    for c in range(whole, dim):
        own[to + c] = x[at + c]


@_inline
def _weigh(logits, count, width, biases, best, totals, shrink):
    """Logits become weights, relative to the running maximum of each query.

    Args:
        logits: (count, ROWS), of which `width` columns are read.
        best, totals: the maximum and the sum of weights of each query until now.
        shrink: receives the factor of what was added up until now.
    """
    for g in range(0, width, WIDE):
        most = load_wide(best, g)
        for j in range(count):
            logit = load_wide(logits, j * ROWS + g) + biases[j]
            store(logits, j * ROWS + g, logit)
            most = larger(most, logit)
        less = falling(load_wide(best, g) - most)
        total = load_wide(totals, g) * less
        for j in range(count):
            weight = falling(load_wide(logits, j * ROWS + g) - most)
            store(logits, j * ROWS + g, weight)
            total = total + weight
        store(best, g, most)
        store(totals, g, total)
        store(shrink, g, less)


@_inline
def _add(sums, rows, wide, shrink, values, weights, count):
    """Shrink the sums of `rows` queries, and add the weights' product with the values of a piece."""
    one = sums.dtype.type(1)
    for i in range(rows):
        if shrink[i] != one:
            for c in range(0, wide, LANES):
                store(sums, i * wide + c, load(sums, i * wide + c) * shrink[i])
    _to_queries(sums, wide, rows, wide, values, wide, weights, count)


@jit
def forward(query, q_at, key, k_at, value, v_at, index, i_at, bias, b_at, scale, out, lse, sizes, begin, end):
    """The output (B, heads, Nq, Dv) and the logarithms of the sums (B, heads, Nq), both contiguous.

    Units are at most ROWS queries of a tile.

    Args:
        query, key, value, index, bias: flat, with the steps between images, heads and rows; `bias` is empty for none.
        sizes: heads, queries, keys, D, Dv, tiles, entries of a list, queries of a tile, keys of a block, units of a
            tile.
    """
    heads, queries, keys, dim, dim_v, tiles, entries, query_tile, key_tile, parts = sizes
    dtype, biased = query.dtype.type, len(bias) > 0
    wide = (dim_v + LANES - 1) // LANES * LANES
    own, own_keys = np.empty(dim * ROWS, dtype), np.empty(PIECE * (dim + CHANNELS), dtype)
    own_values = np.zeros(PIECE * wide, dtype)
    logits, sums, biases = np.empty(PIECE * ROWS, dtype), np.empty(ROWS * wide, dtype), np.empty(PIECE, dtype)
    best, totals, shrink = np.empty(ROWS, dtype), np.empty(ROWS, dtype), np.empty(ROWS, dtype)
    lowest, zero = dtype(-np.inf), dtype(0)
    for unit in range(begin, end):
        part, tile, head = unit % parts, unit // parts % tiles, unit // parts // tiles % heads
        image = unit // parts // tiles // heads
        first = tile * query_tile + part * ROWS
        rows = min(ROWS, queries - first, query_tile - part * ROWS)
        if rows <= 0:
            continue
        width = (rows + WIDE - 1) // WIDE * WIDE
        _turned(query, image * q_at[0] + head * q_at[1] + first * q_at[2], q_at[2], rows, dim, scale, own)
        k_own, v_own = image * k_at[0] + head * k_at[1], image * v_at[0] + head * v_at[1]
        i_own, b_own = image * i_at[0] + head * i_at[1] + tile * i_at[2], image * b_at[0] + head * b_at[1]
        best[:], totals[:], sums[:], count = lowest, zero, zero, 0
        entry, inside = 0, 0
        while True:
            # Copy keys until the piece is full or the list ends.
            while entry < entries and count < PIECE:
                block = index[i_own + entry]
                at = block * key_tile + inside
                left = max(0, min((block + 1) * key_tile, keys) - at) if block >= 0 else 0
                taken = min(left, PIECE - count)
                for j in range(at, at + taken):
                    biases[count] = bias[b_own + j] if biased else zero
                    if biases[count] == lowest:
                        continue
                    for c in range(0, dim, CHANNELS):
                        to = c * PIECE + count * CHANNELS
                        _copied(key, k_own + j * k_at[2] + c, own_keys, to, min(CHANNELS, dim - c))
                    _copied(value, v_own + j * v_at[2], own_values, count * wide, dim_v)
                    count += 1
                entry, inside = (entry + 1, 0) if taken == left else (entry, inside + taken)
            if count == 0:
                break
            _of_keys(logits, ROWS, count, width, own, ROWS, own_keys, min(CHANNELS, dim))
            for c in range(CHANNELS, dim, CHANNELS):
                part_keys, part_own = own_keys[c * PIECE :], own[c * ROWS :]
                _of_more_keys(logits, ROWS, count, width, part_own, ROWS, part_keys, min(CHANNELS, dim - c))
            _weigh(logits, count, width, biases, best, totals, shrink)
            _add(sums, rows, wide, shrink, own_values, logits, count)
            count = 0
        for i in range(rows):
            at = (image * heads + head) * queries + first + i
            # A query without keys has a sum of 0.
            share = zero if best[i] == lowest else dtype(1) / totals[i]
            lse[at] = lowest if best[i] == lowest else best[i] + dtype(math.log(totals[i]))
            for c in range(dim_v):
                out[at * dim_v + c] = sums[i * wide + c] * share

"""Strip attention on a CPU: WIDE queries at a time against all keys, weights and products without a matrix in memory.

Weights are computed for WIDE queries in the lanes of a vector, PIECE keys at a time, and go through the nearest cache
into products, whose sums stay in vector registers. A row's exponents are at most 0 from the start: `best`, the key of
the row's maximum, is the largest key of the head, or the smallest for a negative query. Numba compiles the kernels at
the first call.

Arguments: query, key, value and grad are flat, with the steps between their images, positions and heads; channels lie
side by side. sizes (B, queries, keys, heads, D); D is a multiple of LANES; begin and end, units.
"""

import numpy as np
from numba.extending import register_jitable

from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES, WIDE
from terrazzo.kernels.numba_host.fused_maths import falling
from terrazzo.kernels.numba_host.fused_products import multiplier
from terrazzo.kernels.numba_host.fused_vectors import load, load_wide, splat, store, sum_of
from terrazzo.kernels.strip_attention.fused_cpu import PIECE, ROWS

_inline = register_jitable(forceinline=True)

# Rows of the product are queries with weights, keys with values, and keys with weights.
_to_queries, _of_values, _to_keys = multiplier(WIDE, 1), multiplier(1), multiplier(1, WIDE)


@jit
def gather(key, at, step, own):
    """Read the keys of a head. Returns the smallest and the largest; what is not a number is neither."""
    low, high = key[at], key[at]
    for j in range(len(own)):
        x = key[at + j * step]
        own[j] = x
        low, high = (x if x < low else low), (x if x > high else high)
    return low, high


@jit
def read_queries(query, at, step, rows, low, high, own, best):
    """Read `rows` queries and the key of each row's maximum; queries that fill up a vector are 0."""
    for i in range(WIDE):
        x = query[at + i * step] if i < rows else query.dtype.type(0)
        own[i] = x
        best[i] = high if x >= 0 else low


@_inline
def weigh(given, best, key):
    """The weights of WIDE queries for a key, before the division by their sum."""
    return falling(given * (key - best))


@jit
def forward(query, q_at, key, k_at, value, v_at, out, sizes, begin, end):
    """The output (B, N, heads, D), contiguous. Units are WIDE queries of a head of an image."""
    _, queries, keys, heads, width = sizes
    dtype, blocks = query.dtype.type, (queries + WIDE - 1) // WIDE
    own, best, own_keys = np.empty(WIDE, dtype), np.empty(WIDE, dtype), np.empty(keys, dtype)
    weights, totals, sums = np.empty(PIECE * WIDE, dtype), np.empty(WIDE, dtype), np.empty(WIDE * width, dtype)
    low, high, one = dtype(0), dtype(0), dtype(1)
    for unit in range(begin, end):
        image, head, first = unit // blocks // heads, unit // blocks % heads, unit % blocks * WIDE
        if unit == begin or first == 0:
            low, high = gather(key, image * k_at[0] + head * k_at[2], k_at[1], own_keys)
        rows = min(WIDE, queries - first)
        read_queries(query, image * q_at[0] + first * q_at[1] + head * q_at[2], q_at[1], rows, low, high, own, best)
        given, best_keys = load_wide(own, 0), load_wide(best, 0)
        total = splat(dtype(0))
        sums[:] = 0
        for start in range(0, keys, PIECE):
            count = min(PIECE, keys - start)
            part = splat(dtype(0))
            for j in range(count):
                weight = weigh(given, best_keys, own_keys[start + j])
                store(weights, j * WIDE, weight)
                part = part + weight
            total = total + part
            own_values = value[image * v_at[0] + start * v_at[1] + head * v_at[2] :]
            _to_queries(sums, width, rows, width, own_values, v_at[1], weights, count)
        store(totals, 0, total)
        for i in range(rows):
            at = ((image * queries + first + i) * heads + head) * width
            share = one / totals[i]
            for c in range(0, width, LANES):
                store(out, at + c, load(sums, i * width + c) * share)


@jit
def backward(grad, g_at, query, q_at, key, k_at, value, v_at, d_query, d_key, d_value, sizes, begin, end):
    """Gradients. Units are ROWS queries of a head of an image.

    Args:
        d_query: (B, N, heads).
        d_key, d_value: (parts, B, L, heads) and (parts, B, L, heads, D), sums over the queries of a part.
    """
    images, queries, keys, heads, width = sizes
    dtype, parts = query.dtype.type, (queries + ROWS - 1) // ROWS
    own, best, own_keys = np.empty(WIDE, dtype), np.empty(WIDE, dtype), np.empty(keys, dtype)
    weights, slopes, of_keys = np.empty(keys * WIDE, dtype), np.empty(keys * WIDE, dtype), np.empty(keys * WIDE, dtype)
    grads, turned, of_values = (
        np.empty(WIDE * width, dtype),
        np.empty(width * WIDE, dtype),
        np.empty(keys * width, dtype),
    )
    found, zero, one = np.empty(WIDE, dtype), splat(dtype(0)), splat(dtype(1))
    for unit in range(begin, end):
        image, head, part = unit // parts // heads, unit // parts % heads, unit % parts
        low, high = gather(key, image * k_at[0] + head * k_at[2], k_at[1], own_keys)
        own_values = value[image * v_at[0] + head * v_at[2] :]
        of_keys[:] = 0
        of_values[:] = 0
        for first in range(part * ROWS, min(queries, (part + 1) * ROWS), WIDE):
            rows = min(WIDE, queries - first)
            read_queries(query, image * q_at[0] + first * q_at[1] + head * q_at[2], q_at[1], rows, low, high, own, best)
            given, best_keys = load_wide(own, 0), load_wide(best, 0)
            for i in range(WIDE):
                at = image * g_at[0] + (first + i) * g_at[1] + head * g_at[2]
                for c in range(width):
                    x = grad[at + c] if i < rows else dtype(0)
                    grads[i * width + c] = x
                    turned[c * WIDE + i] = x
            # The derivative of each weight: keys by queries.
            slopes[:] = 0
            _of_values(slopes, WIDE, keys, WIDE, turned, WIDE, own_values, width, v_at[1])
            total, delta, change = zero, zero, zero
            for start in range(0, keys, PIECE):
                totals, deltas = zero, zero
                for j in range(start, min(start + PIECE, keys)):
                    weight = weigh(given, best_keys, own_keys[j])
                    store(weights, j * WIDE, weight)
                    totals = totals + weight
                    deltas = deltas + weight * load_wide(slopes, j * WIDE)
                total, delta = total + totals, delta + deltas
            share = one / total
            delta = delta * share
            for start in range(0, keys, PIECE):
                changes = zero
                for j in range(start, min(start + PIECE, keys)):
                    weight = load_wide(weights, j * WIDE) * share
                    store(weights, j * WIDE, weight)
                    of_score = weight * (load_wide(slopes, j * WIDE) - delta)
                    changes = changes + of_score * own_keys[j]
                    store(of_keys, j * WIDE, load_wide(of_keys, j * WIDE) + of_score * given)
                change = change + changes
            store(found, 0, change)
            for i in range(rows):
                d_query[(image * queries + first + i) * heads + head] = found[i]
            _to_keys(of_values, width, keys, width, grads, width, weights, rows)
        for j in range(keys):
            at = ((part * images + image) * keys + j) * heads + head
            d_key[at] = sum_of(load_wide(of_keys, j * WIDE))
            for c in range(0, width, LANES):
                store(d_value, at * width + c, load(of_values, j * width + c))

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
from terrazzo.kernels.numba_host.fused_vectors import (
    add_all,
    add_multiples_apart,
    load,
    load_all,
    load_all_wide,
    load_wide,
    splat,
    store,
    store_all,
    sum_of,
    zeros,
    zeros_wide,
)
from terrazzo.kernels.strip_attention.fused_cpu import PIECE, ROWS

_inline = register_jitable(forceinline=True)

# Rows of a product whose sums are in registers at once.
BLOCK = 8


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


def _rows_of(count, wide):
    read, read_all, none = (load_wide, load_all_wide, zeros_wide) if wide else (load, load_all, zeros)

    @_inline
    def rows_of(sums, at, step, factors, factor_step, numbers, number_at, number_step, between, terms):
        found = none(sums, count)
        for t in range(terms):
            factor = read(factors, t * factor_step)
            found = add_multiples_apart(found, factor, numbers, number_at + t * between, number_step)
        store_all(sums, at, step, add_all(found, read_all(sums, at, step, count)))

    return rows_of


_wide_block, _wide_row, _block, _row = (
    _rows_of(BLOCK, True),
    _rows_of(1, True),
    _rows_of(BLOCK, False),
    _rows_of(1, False),
)


@jit
def multiply(sums, step, rows, width, factors, factor_step, numbers, number_step, between, terms):
    """Add a product to `sums`, rows of `width` numbers that are `step` apart.

    Args:
        factors: `terms` rows of `width` numbers, `factor_step` apart.
        numbers: the number of row r and term t is at r * number_step + t * between.
    """
    for c in range(0, width, WIDE):
        whole, wide, own = rows // BLOCK * BLOCK, width - c >= WIDE, factors[c:]
        for r in range(0, whole, BLOCK):
            if wide:
                _wide_block(
                    sums, r * step + c, step, own, factor_step, numbers, r * number_step, number_step, between, terms
                )
            else:
                _block(
                    sums, r * step + c, step, own, factor_step, numbers, r * number_step, number_step, between, terms
                )
        for r in range(whole, rows):
            if wide:
                _wide_row(
                    sums, r * step + c, step, own, factor_step, numbers, r * number_step, number_step, between, terms
                )
            else:
                _row(sums, r * step + c, step, own, factor_step, numbers, r * number_step, number_step, between, terms)


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
            multiply(sums, width, rows, width, own_values, v_at[1], weights, 1, WIDE, count)
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
            multiply(slopes, WIDE, keys, WIDE, turned, WIDE, own_values, v_at[1], 1, width)
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
            multiply(of_values, width, keys, width, grads, width, weights, WIDE, 1, rows)
        for j in range(keys):
            at = ((part * images + image) * keys + j) * heads + head
            d_key[at] = sum_of(load_wide(of_keys, j * WIDE))
            for c in range(0, width, LANES):
                store(d_value, at * width + c, load(of_values, j * width + c))

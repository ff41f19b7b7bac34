"""Neighborhood attention on a CPU: sums stay in vector registers, and each vector of keys serves two queries.

A unit is a tile of positions of one image, head and residue class. It copies what its tile reads into memory that stays
in the caches: keys with columns side by side, so that a vector of keys meets one number of a query, and values with
channels side by side, so that a vector of channels meets one weight. So no window needs a mask within a tile, and the
lanes of a vector are summed up only for a query's weights. Two queries, one above the other, share all but one row of
keys.

Numba compiles the kernels at the first call. Arrays are flat: q, k, v and grad with the steps of their axes (B, H, W,
heads), whose channels are contiguous and fill whole vectors; out and gradients (B, H, W, heads, D), contiguous; bias
(heads, 2 kernel_h - 1, 2 kernel_w - 1 + pitch) times log2(e), or empty for none.

Arguments: sizes (B, H, W, heads, D); window, kernel and dilation of both axes; cut, see `fused_cpu.Cut`.
"""

import numpy as np
from numba.extending import register_jitable

from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES, LOG2_E, WIDE
from terrazzo.kernels.numba_host.fused_maths import exp2
from terrazzo.kernels.numba_host.fused_vectors import (
    add_products,
    add_products_of_two,
    keep,
    larger,
    largest_of,
    load,
    load_wide,
    multiply_all,
    spread,
    store,
    store_all,
    store_two,
    sum_of,
    turned,
    zeros,
)

_inline = register_jitable(forceinline=True)


@_inline
def class_members(length, first, dilation):
    """Positions of the residue class `first` of an axis."""
    return (length - first + dilation - 1) // dilation


@_inline
def window_start(member, members, kernel):
    """The first key of a query's window."""
    return min(max(member - kernel // 2, 0), members - kernel)


@_inline
def first_query(member, members, kernel):
    """The first query that sees a key."""
    return 0 if member < kernel else member - (kernel - 1 - kernel // 2)


@_inline
def last_query(member, members, kernel):
    return members - 1 if member >= members - kernel else member + kernel // 2


@_inline
def pitch_of(kernel_w):
    """Numbers between two rows of a query's weights: whole vectors."""
    return -(-kernel_w // LANES) * LANES


@_inline
def half_of(size):
    """Numbers of the memory of one query's weights: whole wide vectors."""
    return -(-size // WIDE) * WIDE


@_inline
def line_of(columns):
    """Numbers between two lines of turned keys: an odd number of cache lines, so that lines do not share their sets."""
    return ((columns + LANES + 15) // 16 | 1) * 16


@_inline
def tile_of(unit, sizes, window, cut):
    """Where a unit is: head, image, residue class per axis, the lengths of the class, and its tile in members."""
    rest, strip = unit // cut[3], unit % cut[3]
    rest, band = rest // cut[2], rest % cut[2]
    rest, class_w = rest // window[3], rest % window[3]
    rest, class_h = rest // window[2], rest % window[2]
    members_h = class_members(sizes[1], class_h, window[2])
    members_w = class_members(sizes[2], class_w, window[3])
    rows = band * cut[0], min(band * cut[0] + cut[0], members_h)
    columns = strip * cut[1], min(strip * cut[1] + cut[1], members_w)
    return rest // sizes[0], rest % sizes[0], (class_h, class_w), (members_h, members_w), rows, columns


@_inline
def axes_of(steps, tile, window):
    """The place of a tile's first pixel in an array, and the numbers between two of its rows and of its columns.

    Args:
        tile: image, head, row, column and the residue class per axis.
    """
    image, head, row, column, residues = tile
    y, x = row * window[2] + residues[0], column * window[3] + residues[1]
    at = image * steps[0] + y * steps[1] + x * steps[2] + head * steps[3]
    return at, steps[1] * window[2], steps[2] * window[3]


@jit
def turn(x, axes, rows, columns, channels, out, line):
    """Copy pixels to out[row, channel, column], lines of `line` numbers."""
    at, row_step, column_step = axes
    last = columns - 1
    for i in range(rows):
        for j in range(0, columns, LANES):
            p = at + i * row_step
            p_0, p_1 = p + j * column_step, p + min(j + 1, last) * column_step
            p_2, p_3 = p + min(j + 2, last) * column_step, p + min(j + 3, last) * column_step
            p_4, p_5 = p + min(j + 4, last) * column_step, p + min(j + 5, last) * column_step
            p_6, p_7 = p + min(j + 6, last) * column_step, p + min(j + 7, last) * column_step
            for c in range(0, channels, LANES):
                pixels = (
                    load(x, p_0 + c),
                    load(x, p_1 + c),
                    load(x, p_2 + c),
                    load(x, p_3 + c),
                    load(x, p_4 + c),
                    load(x, p_5 + c),
                    load(x, p_6 + c),
                    load(x, p_7 + c),
                )
                store_all(out, (i * channels + c) * line + j, line, turned(pixels))


@jit
def gather(x, axes, rows, columns, channels, factor, out):
    """Copy pixels times factor[0] to out[row, column, channel]."""
    at, row_step, column_step = axes
    by = spread(factor, 0)
    for i in range(rows):
        for j in range(columns):
            p, o = at + i * row_step + j * column_step, (i * columns + j) * channels
            for c in range(0, channels, LANES):
                store(out, o + c, load(x, p + c) * by)


def _products_of(count, shift):
    both = 2 * count

    @_inline
    def products(x, a, b, y, y_at, channels, line, out, out_at, pitch, half):
        sums = zeros(y, both)
        for c in range(channels):
            place = y_at + c * line
            sums = add_products_of_two(sums, spread(x, a + c), spread(x, b + c), y, place, channels * line, shift)
        store_two(out, out_at, out_at + half, pitch, sums)

    return products


_same_1, _same_3, _same_5, _same_7 = (_products_of(i, 0) for i in (1, 3, 5, 7))
_next_1, _next_3, _next_5, _next_7 = (_products_of(i, 1) for i in (1, 3, 5, 7))


@_inline
def products(x, a, b, shift, y, y_at, channels, line, kernel_h, pitch, block, out):
    """Products of two pixels, x[a] and x[b], with all pixels of their windows: two halves of out.

    Args:
        shift: rows from the first pixel's window to the second's, 0 or 1.
        y, y_at: turned pixels, and the first pixel's window among them.
        block: rows that are computed at once, 1, 3, 5 or 7. The last block overlaps the block before it.
    """
    half, step = len(out) // 2, channels * line
    for lane in range(0, pitch, LANES):
        i = 0
        while i < kernel_h:
            i = min(i, kernel_h - block)
            p, o = y_at + i * step + lane, i * pitch + lane
            if shift:
                if block == 7:
                    _next_7(x, a, b, y, p, channels, line, out, o, pitch, half)
                elif block == 5:
                    _next_5(x, a, b, y, p, channels, line, out, o, pitch, half)
                elif block == 3:
                    _next_3(x, a, b, y, p, channels, line, out, o, pitch, half)
                else:
                    _next_1(x, a, b, y, p, channels, line, out, o, pitch, half)
            elif block == 7:
                _same_7(x, a, b, y, p, channels, line, out, o, pitch, half)
            elif block == 5:
                _same_5(x, a, b, y, p, channels, line, out, o, pitch, half)
            elif block == 3:
                _same_3(x, a, b, y, p, channels, line, out, o, pitch, half)
            else:
                _same_1(x, a, b, y, p, channels, line, out, o, pitch, half)
            i += block


@_inline
def _scored(p, at, bias, b_at, columns, lowest):
    """Scores with their bias; `lowest` behind the window's columns."""
    score = load(p, at)
    if len(bias) > 0:
        score = score + load(bias, b_at)
    score = keep(score, columns, lowest)
    store(p, at, score)
    return score


@_inline
def weigh(p_a, p_b, shape, bias, a_at, b_at, b_line, numbers):
    """Turn the scores of two queries into weights: 2^(score + bias - largest), and 0 behind a row of the window.

    Args:
        p_a, p_b: rows of scores, and numbers behind them that mean nothing.
        shape: rows and columns of a window, and numbers between two rows of scores.
        a_at, b_at, b_line: where the queries' biases begin, and numbers between two rows.
        numbers: -inf; the sums of the weights are written behind it.
    """
    (rows, columns, pitch), lowest = shape, numbers[0]
    most_a, most_b = spread(numbers, 0), spread(numbers, 0)
    for i in range(rows):
        for j in range(0, columns, LANES):
            o, o_bias = i * pitch + j, i * b_line + j
            most_a = larger(most_a, _scored(p_a, o, bias, a_at + o_bias, columns - j, lowest))
            most_b = larger(most_b, _scored(p_b, o, bias, b_at + o_bias, columns - j, lowest))
    top_a, top_b = largest_of(most_a), largest_of(most_b)
    for i in range(0, len(p_a), WIDE):
        store(p_a, i, exp2(load_wide(p_a, i) - top_a))
        store(p_b, i, exp2(load_wide(p_b, i) - top_b))
    total_a, total_b = load(p_a, 0), load(p_b, 0)
    for i in range(LANES, rows * pitch, LANES):
        total_a, total_b = total_a + load(p_a, i), total_b + load(p_b, i)
    numbers[1], numbers[2] = sum_of(total_a), sum_of(total_b)


def _weighted_of(count):
    @_inline
    def weighted(weights, shape, shift, y, y_at, line, step, factors, out, a, b):
        rows, columns, pitch = shape
        first, second, half = zeros(y, count), zeros(y, count), len(weights) // 2
        if shift:
            last, p = half + (rows - 1) * pitch, y_at + rows * line
            for j in range(columns):
                first = add_products(first, spread(weights, j), y, y_at + j * step, LANES)
                second = add_products(second, spread(weights, last + j), y, p + j * step, LANES)
        for i in range(rows - shift):
            w_a, w_b, p = (i + shift) * pitch, half + i * pitch, y_at + (i + shift) * line
            for j in range(columns):
                first = add_products(first, spread(weights, w_a + j), y, p + j * step, LANES)
                second = add_products(second, spread(weights, w_b + j), y, p + j * step, LANES)
        store_all(out, a, LANES, multiply_all(first, spread(factors, 0)))
        store_all(out, b, LANES, multiply_all(second, spread(factors, 1)))

    return weighted


_weighted_1, _weighted_2, _weighted_4 = (_weighted_of(i) for i in (1, 2, 4))


@_inline
def weighted(weights, shape, shift, y, y_at, line, channels, block, factors, out, a, b):
    """Sums of the pixels of two windows by the halves of `weights`, times `factors`, to out[a] and out[b].

    Args:
        shape: rows and columns of a window, and numbers between two rows of weights.
        shift: as in `products`.
        y, y_at, line: pixels, the first window among them, numbers between their rows.
        block: vectors of channels that are computed at once, 1, 2 or 4.
    """
    c = 0
    while c < channels:
        c = min(c, channels - block * LANES)
        if block == 4:
            _weighted_4(weights, shape, shift, y, y_at + c, line, channels, factors, out, a + c, b + c)
        elif block == 2:
            _weighted_2(weights, shape, shift, y, y_at + c, line, channels, factors, out, a + c, b + c)
        else:
            _weighted_1(weights, shape, shift, y, y_at + c, line, channels, factors, out, a + c, b + c)
        c += block * LANES


@jit
def forward(q, k, v, steps, bias, scale, sizes, window, cut, out, first, last):
    """The output of the units from `first` to `last`."""
    _, height, width, heads, channels = sizes
    kernel_h, kernel_w, dilation_h, dilation_w = window
    band, strip, _, _, rows_block, vectors_block = cut
    dtype = q.dtype
    pitch, line = pitch_of(kernel_w), line_of(strip + kernel_w - 1 + pitch_of(kernel_w))
    size, b_line = kernel_h * pitch, 2 * kernel_w - 1 + pitch
    out_step = dilation_h * width * heads * channels
    keys = np.empty((band + kernel_h - 1) * channels * line, dtype)
    values = np.empty((band + kernel_h - 1) * (strip + kernel_w - 1) * channels, dtype)
    queries = np.empty(band * strip * channels, dtype)
    shape, half = (kernel_h, kernel_w, pitch), half_of(size)
    p = np.zeros(2 * half, dtype)
    p_a, p_b = p[:half], p[half:]
    factors, totals = np.empty(2, dtype), np.full(3, -np.inf, dtype)
    to_scores, one = np.full(1, scale * LOG2_E, dtype), np.full(1, 1, dtype)
    for unit in range(first, last):
        head, image, residues, members, (top, bottom), (left, right) = tile_of(unit, sizes, window, cut)
        if top >= bottom or left >= right:
            continue
        key_top, key_left = window_start(top, members[0], kernel_h), window_start(left, members[1], kernel_w)
        rows = window_start(bottom - 1, members[0], kernel_h) + kernel_h - key_top
        columns = window_start(right - 1, members[1], kernel_w) + kernel_w - key_left
        own, seen = (image, head, top, left, residues), (image, head, key_top, key_left, residues)
        span = right - left
        gather(q, axes_of(steps[0], own, window), bottom - top, span, channels, to_scores, queries)
        turn(k, axes_of(steps[1], seen, window), rows, columns, channels, keys, line)
        gather(v, axes_of(steps[2], seen, window), rows, columns, channels, one, values)
        for row in range(top, bottom, 2):
            start_h = window_start(row, members[0], kernel_h)
            other = min(row + 1, bottom - 1)
            shift = window_start(other, members[0], kernel_h) - start_h
            for column in range(left, right):
                start_w = window_start(column, members[1], kernel_w)
                a = ((row - top) * span + column - left) * channels
                b = a + (other - row) * span * channels
                k_at = (start_h - key_top) * channels * line + start_w - key_left
                products(queries, a, b, shift, keys, k_at, channels, line, kernel_h, pitch, rows_block, p)
                b_at = (head * (2 * kernel_h - 1) + start_h - row + kernel_h - 1) * b_line
                b_at += start_w - column + kernel_w - 1
                next_at = b_at + (shift - other + row) * b_line
                weigh(p_a, p_b, shape, bias, b_at, next_at, b_line, totals)
                factors[0], factors[1] = one[0] / totals[1], one[0] / totals[2]
                y, x = row * dilation_h + residues[0], column * dilation_w + residues[1]
                a = (((image * height + y) * width + x) * heads + head) * channels
                b = a + (other - row) * out_step
                v_at, v_line = ((start_h - key_top) * columns + start_w - key_left) * channels, columns * channels
                weighted(p, shape, shift, values, v_at, v_line, channels, vectors_block, factors, out, a, b)


@_inline
def slope(p, d, total, shape, numbers, all_p, all_d, at):
    """Normalise weights p, and turn their gradients d into those of the scores; both are also stored at `at`.

    The gradient of a score is p (d - delta), where delta is the sum of all p d.

    Args:
        numbers: three numbers to work with.
    """
    rows, columns, pitch = shape
    numbers[0], numbers[1] = 1, 0
    numbers[0] = numbers[0] / total
    by, delta = spread(numbers, 0), spread(numbers, 1)
    for i in range(rows):
        for j in range(0, columns, LANES):
            o = i * pitch + j
            weight = load(p, o) * by
            change = keep(load(d, o), columns - j, numbers[1])
            store(p, o, weight)
            store(d, o, change)
            delta = delta + weight * change
    numbers[2] = sum_of(delta)
    mean = spread(numbers, 2)
    for i in range(rows):
        for j in range(0, columns, LANES):
            o = i * pitch + j
            weight = load(p, o)
            change = keep(weight * (load(d, o) - mean), columns - j, numbers[1])
            store(d, o, change)
            store(all_p, at + o, weight)
            store(all_d, at + o, change)


@_inline
def add_rows(out, at, line, x, rows, pitch):
    """Add (rows, pitch) numbers to lines of `out`."""
    for i in range(rows):
        for j in range(0, pitch, LANES):
            store(out, at + i * line + j, load(out, at + i * line + j) + load(x, i * pitch + j))


def _collected_of(count):
    @_inline
    def collected(p, d, key, area, starts, shape, queries, grads, c, by, dk, dv, out):
        (row, column), (top, bottom, left, right), (pitch, size, span, channels) = key, area, shape
        row_starts, column_starts = starts
        sums_k, sums_v = zeros(p, count), zeros(p, count)
        for i in range(top, bottom):
            place = (row - row_starts[i]) * pitch + column
            for j in range(left, right):
                query = i * span + j
                w, x = query * size + place - column_starts[j], query * channels + c
                sums_k = add_products(sums_k, spread(d, w), queries, x, LANES)
                sums_v = add_products(sums_v, spread(p, w), grads, x, LANES)
        store_all(dk, out + c, LANES, multiply_all(sums_k, spread(by, 0)))
        store_all(dv, out + c, LANES, sums_v)

    return collected


_collected_1, _collected_2, _collected_4 = (_collected_of(i) for i in (1, 2, 4))


@_inline
def collected(p, d, key, area, starts, shape, queries, grads, block, by, dk, dv, out):
    """Gradients of a key, times by[0], and of its value, to dk[out] and dv[out].

    Args:
        p, d: weights, and gradients of scores, of all queries of a tile.
        key: its row and column.
        area: the rectangle of the queries that see it.
        starts: the first row of each row of queries' windows, and the first column of each column's.
        shape: numbers between two rows of weights and between two queries, queries of a row, channels.
        block: as in `weighted`.
    """
    c = 0
    while c < shape[3]:
        c = min(c, shape[3] - block * LANES)
        if block == 4:
            _collected_4(p, d, key, area, starts, shape, queries, grads, c, by, dk, dv, out)
        elif block == 2:
            _collected_2(p, d, key, area, starts, shape, queries, grads, c, by, dk, dv, out)
        else:
            _collected_1(p, d, key, area, starts, shape, queries, grads, c, by, dk, dv, out)
        c += block * LANES


@jit
def backward(q, k, v, grad, steps, bias, scale, sizes, window, cut, dq, dk, dv, dbias, dbias_at, first, last):
    """Gradients of the units from `first` to `last`.

    The weights of all queries that see a unit's keys are computed again, and kept while gradients of keys and values
    are summed up: each key's queries are in a rectangle.

    Args:
        dbias: at `dbias_at`, sums of the units' queries (heads, 2 kernel_h - 1, 2 kernel_w - 1 + pitch) that begin at
            0; empty without a bias.
    """
    _, height, width, heads, channels = sizes
    kernel_h, kernel_w, dilation_h, dilation_w = window
    band, strip, _, _, rows_block, vectors_block = cut
    dtype = q.dtype
    longest_h, longest_w = class_members(height, 0, dilation_h), class_members(width, 0, dilation_w)
    most_queries = min(band + 2 * kernel_h - 2, longest_h) * min(strip + 2 * kernel_w - 2, longest_w)
    most_h, most_w = min(band + 3 * kernel_h - 3, longest_h), min(strip + 3 * kernel_w - 3, longest_w)
    pitch = pitch_of(kernel_w)
    line, size, b_line = line_of(most_w + pitch), kernel_h * pitch, 2 * kernel_w - 1 + pitch
    out_step = dilation_h * width * heads * channels
    keys, values = np.empty(most_h * channels * line, dtype), np.empty(most_h * channels * line, dtype)
    plain = np.empty(most_h * most_w * channels, dtype)
    queries, grads = np.empty(most_queries * channels, dtype), np.empty(most_queries * channels, dtype)
    all_p, all_d = np.empty(most_queries * size, dtype), np.empty(most_queries * size, dtype)
    row_starts, column_starts = np.empty(longest_h, np.int64), np.empty(longest_w, np.int64)
    shape, half = (kernel_h, kernel_w, pitch), half_of(size)
    p, d = np.zeros(2 * half, dtype), np.zeros(2 * half, dtype)
    p_a, p_b, d_a, d_b = p[:half], p[half:], d[:half], d[half:]
    numbers, totals = np.empty(3, dtype), np.full(3, -np.inf, dtype)
    to_scores, one, scales = np.full(1, scale * LOG2_E, dtype), np.full(1, 1, dtype), np.full(2, scale, dtype)
    back = np.full(1, 1 / LOG2_E, dtype)
    for unit in range(first, last):
        head, image, residues, members, (top, bottom), (left, right) = tile_of(unit, sizes, window, cut)
        if top >= bottom or left >= right:
            continue
        q_top, q_bottom = first_query(top, members[0], kernel_h), last_query(bottom - 1, members[0], kernel_h) + 1
        q_left, q_right = first_query(left, members[1], kernel_w), last_query(right - 1, members[1], kernel_w) + 1
        key_top, key_left = window_start(q_top, members[0], kernel_h), window_start(q_left, members[1], kernel_w)
        rows = window_start(q_bottom - 1, members[0], kernel_h) + kernel_h - key_top
        columns = window_start(q_right - 1, members[1], kernel_w) + kernel_w - key_left
        span = q_right - q_left
        for i in range(q_bottom - q_top):
            row_starts[i] = window_start(q_top + i, members[0], kernel_h)
        for i in range(span):
            column_starts[i] = window_start(q_left + i, members[1], kernel_w)
        seeing, seen = (image, head, q_top, q_left, residues), (image, head, key_top, key_left, residues)
        gather(q, axes_of(steps[0], seeing, window), q_bottom - q_top, span, channels, to_scores, queries)
        gather(grad, axes_of(steps[3], seeing, window), q_bottom - q_top, span, channels, one, grads)
        gather(k, axes_of(steps[1], seen, window), rows, columns, channels, one, plain)
        turn(k, axes_of(steps[1], seen, window), rows, columns, channels, keys, line)
        turn(v, axes_of(steps[2], seen, window), rows, columns, channels, values, line)
        for part in range(3):  # queries above the tile, its own, and those below it
            begin = q_top if part == 0 else top if part == 1 else bottom
            end = top if part == 0 else bottom if part == 1 else q_bottom
            for row in range(begin, end, 2):
                start_h = window_start(row, members[0], kernel_h)
                other = min(row + 1, end - 1)
                shift = window_start(other, members[0], kernel_h) - start_h
                for column in range(q_left, q_right):
                    start_w = window_start(column, members[1], kernel_w)
                    query_a = (row - q_top) * span + column - q_left
                    query_b = query_a + (other - row) * span
                    a, b = query_a * channels, query_b * channels
                    k_at = (start_h - key_top) * channels * line + start_w - key_left
                    products(queries, a, b, shift, keys, k_at, channels, line, kernel_h, pitch, rows_block, p)
                    products(grads, a, b, shift, values, k_at, channels, line, kernel_h, pitch, rows_block, d)
                    a_at = (head * (2 * kernel_h - 1) + start_h - row + kernel_h - 1) * b_line
                    a_at += start_w - column + kernel_w - 1
                    b_at = a_at + (shift - other + row) * b_line
                    weigh(p_a, p_b, shape, bias, a_at, b_at, b_line, totals)
                    slope(p_a, d_a, totals[1], shape, numbers, all_p, all_d, query_a * size)
                    slope(p_b, d_b, totals[2], shape, numbers, all_p, all_d, query_b * size)
                    if part != 1 or column < left or column >= right:
                        continue
                    y, x = row * dilation_h + residues[0], column * dilation_w + residues[1]
                    a = (((image * height + y) * width + x) * heads + head) * channels
                    b = a + (other - row) * out_step
                    k_at = ((start_h - key_top) * columns + start_w - key_left) * channels
                    k_line = columns * channels
                    weighted(d, shape, shift, plain, k_at, k_line, channels, vectors_block, scales, dq, a, b)
                    if len(dbias) > 0:
                        add_rows(dbias, dbias_at + a_at, b_line, d_a, kernel_h, pitch)
                        if other > row:
                            add_rows(dbias, dbias_at + b_at, b_line, d_b, kernel_h, pitch)
        starts, kept = (row_starts, column_starts), (pitch, size, span, channels)
        for row in range(top, bottom):
            above = first_query(row, members[0], kernel_h) - q_top
            below = last_query(row, members[0], kernel_h) + 1 - q_top
            for column in range(left, right):
                before = first_query(column, members[1], kernel_w) - q_left
                behind = last_query(column, members[1], kernel_w) + 1 - q_left
                place, area = (row, column), (above, below, before, behind)
                y, x = row * dilation_h + residues[0], column * dilation_w + residues[1]
                a = (((image * height + y) * width + x) * heads + head) * channels
                collected(all_p, all_d, place, area, starts, kept, queries, grads, vectors_block, back, dk, dv, a)

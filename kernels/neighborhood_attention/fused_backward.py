"""Triton kernels of the backward pass: no atomics, so the same bits every time.

`backward_queries` computes the gradient of the queries, the rows' `delta` and partial sums of the bias' gradient.
`backward_keys` sums the gradients of keys and values over the queries that see them. `backward_classes` computes all
gradients at once if a class is one window. `reduce_*` add partial sums into the bias table.

Source: FlashAttention-2, arXiv 2307.08691, for the recomputed weights.
"""

import triton
import triton.language as tl

from terrazzo.kernels.neighborhood_attention.fused_common import (
    bias_offset,
    class_rows,
    first_query,
    in_window,
    last_query,
    locate_class,
    locate_tile,
    map_offset,
    member_offset,
    output_offsets,
    query_window,
    scores,
    tile_members,
    window_start,
)
from terrazzo.kernels.triton_host.fused_tiles import exponential, load_rows, product, store_rows

_SIZES = [
    "height",
    "width",
    "dilation_h",
    "dilation_w",
    "tiles_h",
    "tiles_w",
    "heads",
    "items",
    "slices",
]


@triton.jit(do_not_specialize=_SIZES)
def backward_queries(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_out,
    p_lse,
    p_grad,
    p_delta,
    p_grad_query,
    p_partial,
    scale,
    heads,
    height,
    width,
    dilation_h,
    dilation_w,
    tiles_h,
    tiles_w,
    items,
    slices,
    stride_b,
    stride_h,
    stride_w,
    stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS_W: tl.constexpr,
    BEFORE_W: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Every `slices`-th tile of one head, from the program's slice on; tiles are as in the forward pass.

    The gradient of the scores is summed by bias row (one product with a 0/1 matrix per chunk of keys), query column and
    key column relative to the tile, in `p_partial` (slices, heads, BINS, TILE_W, WIDTH), which starts as zeros. The
    remaining sum is over diagonals of the last two axes; it does not depend on the tile, and `reduce_tiles` computes
    it. Column BEFORE_W of WIDTH is the tile's first column.
    """
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    PAIRS: tl.constexpr = TILE_H * ROWS
    # Up to Triton 3.6 a product needs an inner size of at least 16: copies of the pairs fill it and count in no bin.
    COPIES: tl.constexpr = 1 if PAIRS >= 16 else 16 // PAIRS
    program = tl.program_id(0)
    head = program % heads
    slice_ = program // heads
    o_m = tl.arange(0, TILE_H * TILE_W)
    o_n = tl.arange(0, ROWS * COLUMNS)
    if HAS_BIAS:
        p_bias += head * ((2 * K_H - 1) * (2 * K_W - 1))
        p_partial += program.to(tl.int64) * (BINS * TILE_W * WIDTH)
    step_h = stride_h.to(tl.int64) * dilation_h
    step_w = stride_w.to(tl.int64) * dilation_w
    for number in range(slice_, items, slices):
        item, class_h, class_w, members_h, members_w = locate_class(number, height, width, dilation_h, dilation_w)
        batch, first_h, first_w, origin_h, origin_w = locate_tile(
            item, tiles_h, tiles_w, members_h, members_w, TILE_H, TILE_W
        )
        if (first_h < members_h) & (first_w < members_w):
            query_h, query_w, b_own = tile_members(
                o_m, first_h, first_w, origin_h, origin_w, members_h, members_w, TILE_W
            )
            start_h = query_window(query_h, members_h, K_H)
            start_w = query_window(query_w, members_w, K_W)

            o_map = map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR)
            o_query = member_offset(query_h, query_w, step_h, step_w, VECTOR)
            b_query = load_rows(p_query + o_map, o_query, b_own, HEAD_DIM, BLOCK_D)
            o_out, o_row = output_offsets(
                batch, head, query_h, query_w, class_h, class_w, height, width, heads, dilation_h, dilation_w, HEAD_DIM
            )
            b_grad = load_rows(p_grad, o_out, b_own, HEAD_DIM, BLOCK_D)
            b_out = load_rows(p_out, o_out, b_own, HEAD_DIM, BLOCK_D)
            b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
            tl.store(p_delta + o_row, b_delta, mask=b_own)
            # Rows that this tile does not own get the weight exp(-inf) = 0, so they do not count.
            b_lse = tl.load(p_lse + o_row, mask=b_own, other=float("inf"))

            b_grad_query = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
            row_begin = window_start(first_h, members_h, K_H)
            row_end = window_start(tl.minimum(origin_h + TILE_H, members_h) - 1, members_h, K_H) + K_H
            column_begin = window_start(first_w, members_w, K_W)
            for chunk in range(CHUNKS_W):
                column = column_begin + chunk * COLUMNS
                key_w = column + o_n % COLUMNS
                b_real_w = key_w < members_w
                b_inside_w = in_window(start_w[:, None], key_w[None, :], K_W)
                if HAS_BIAS:
                    b_bins = tl.zeros([BINS, TILE_W * COLUMNS], tl.float32)
                for row in range(row_begin, row_end, ROWS):
                    key_h = row + o_n // COLUMNS
                    o_key = member_offset(key_h, key_w, step_h, step_w, VECTOR)
                    b_real = b_real_w & (key_h < members_h)
                    b_key = load_rows(p_key + o_map, o_key, b_real, HEAD_DIM, BLOCK_D)
                    b_value = load_rows(p_value + o_map, o_key, b_real, HEAD_DIM, BLOCK_D)
                    b_zero = tl.zeros([TILE_H * TILE_W, ROWS * COLUMNS], tl.float32)
                    b_score = product(b_query, tl.trans(b_key), b_zero, PRECISION, INTERPRETED)
                    b_inside = in_window(start_h[:, None], key_h[None, :], K_H) & b_inside_w
                    o_bias = bias_offset(query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], K_H, K_W)
                    b_score = scores(b_score, p_bias, o_bias, b_inside, scale, HAS_BIAS)
                    b_weight = exponential(b_score, b_lse[:, None], EXACT)
                    b_grad_score = product(b_grad, tl.trans(b_value), b_zero, PRECISION, INTERPRETED)
                    b_grad_score = (b_weight * (b_grad_score - b_delta[:, None])).to(b_key.dtype)
                    b_grad_query = product(b_grad_score, b_key, b_grad_query, PRECISION, INTERPRETED)
                    if HAS_BIAS:
                        if BINS == 1:
                            b_bins += tl.reshape(b_grad_score, (1, TILE_W * COLUMNS)).to(tl.float32)
                        else:
                            b_pairs = tl.reshape(b_grad_score, (TILE_H, TILE_W, ROWS, COLUMNS))
                            b_pairs = tl.reshape(tl.permute(b_pairs, (0, 2, 1, 3)), (1, PAIRS, TILE_W * COLUMNS))
                            b_pairs = tl.broadcast_to(b_pairs, (COPIES, PAIRS, TILE_W * COLUMNS))
                            b_pairs = tl.reshape(b_pairs, (COPIES * PAIRS, TILE_W * COLUMNS))
                            o_pair = tl.arange(0, COPIES * PAIRS)
                            o_bin = row + o_pair % ROWS - origin_h - o_pair // ROWS + K_H - 1
                            o_bin = tl.where(o_pair < PAIRS, o_bin, -1)
                            b_bin = (tl.arange(0, BINS)[:, None] == o_bin[None, :]).to(tl.float32).to(b_pairs.dtype)
                            b_bins = product(b_bin, b_pairs, b_bins, PRECISION, INTERPRETED)
                if HAS_BIAS:
                    o_pair = tl.arange(0, TILE_W * COLUMNS)
                    o_bins = tl.arange(0, BINS)[:, None] * TILE_W + (o_pair // COLUMNS)[None, :]
                    o_bins = o_bins * WIDTH + (column - origin_w + BEFORE_W + o_pair % COLUMNS)[None, :]
                    p_bins = p_partial + o_bins
                    tl.debug_barrier()  # other threads' stores for the program's previous tile must be visible
                    tl.store(p_bins, tl.load(p_bins) + b_bins)
            store_rows(p_grad_query, o_out, b_grad_query * scale, b_own, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def backward_keys(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_lse,
    p_grad,
    p_delta,
    p_grad_key,
    p_grad_value,
    scale,
    heads,
    height,
    width,
    dilation_h,
    dilation_w,
    tiles_h,
    tiles_w,
    stride_b,
    stride_h,
    stride_w,
    stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of keys, against ROWS x COLUMNS of its queries at a time; scores are keys by queries."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    head = program % heads
    item, class_h, class_w, members_h, members_w = locate_class(program // heads, height, width, dilation_h, dilation_w)
    batch, first_h, first_w, origin_h, origin_w = locate_tile(
        item, tiles_h, tiles_w, members_h, members_w, TILE_H, TILE_W
    )
    if (first_h < members_h) & (first_w < members_w):
        o_m = tl.arange(0, TILE_H * TILE_W)
        key_h, key_w, b_own = tile_members(o_m, first_h, first_w, origin_h, origin_w, members_h, members_w, TILE_W)

        o_map = map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR)
        step_h = stride_h.to(tl.int64) * dilation_h
        step_w = stride_w.to(tl.int64) * dilation_w
        o_key = member_offset(key_h, key_w, step_h, step_w, VECTOR)
        b_key = load_rows(p_key + o_map, o_key, b_own, HEAD_DIM, BLOCK_D)
        b_value = load_rows(p_value + o_map, o_key, b_own, HEAD_DIM, BLOCK_D)
        if HAS_BIAS:
            p_bias += head * ((2 * K_H - 1) * (2 * K_W - 1))

        b_grad_key = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        b_grad_value = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        o_n = tl.arange(0, ROWS * COLUMNS)
        # Only for keys that the tile owns: a tile moved inward needs no queries for the keys that it repeats.
        row_begin = first_query(first_h, K_H)
        row_end = last_query(tl.minimum(origin_h + TILE_H, members_h) - 1, members_h, K_H) + 1
        column_begin = first_query(first_w, K_W)
        column_end = last_query(tl.minimum(origin_w + TILE_W, members_w) - 1, members_w, K_W) + 1
        for column in range(column_begin, column_end, COLUMNS):
            query_w = column + o_n % COLUMNS
            start_w = window_start(query_w, members_w, K_W)
            b_inside_w = in_window(start_w[None, :], key_w[:, None], K_W)
            for row in range(row_begin, row_end, ROWS):
                query_h = row + o_n // COLUMNS
                start_h = window_start(query_h, members_h, K_H)
                b_real = (query_w < members_w) & (query_h < members_h)
                o_query = member_offset(query_h, query_w, step_h, step_w, VECTOR)
                b_query = load_rows(p_query + o_map, o_query, b_real, HEAD_DIM, BLOCK_D)
                o_out, o_row = output_offsets(
                    batch,
                    head,
                    query_h,
                    query_w,
                    class_h,
                    class_w,
                    height,
                    width,
                    heads,
                    dilation_h,
                    dilation_w,
                    HEAD_DIM,
                )
                b_grad = load_rows(p_grad, o_out, b_real, HEAD_DIM, BLOCK_D)
                b_lse = tl.load(p_lse + o_row, mask=b_real, other=float("inf"))
                b_delta = tl.load(p_delta + o_row, mask=b_real, other=0.0)
                b_zero = tl.zeros([TILE_H * TILE_W, ROWS * COLUMNS], tl.float32)
                b_score = product(b_key, tl.trans(b_query), b_zero, PRECISION, INTERPRETED)
                b_inside = in_window(start_h[None, :], key_h[:, None], K_H) & b_inside_w & b_real[None, :]
                o_bias = bias_offset(query_h[None, :], query_w[None, :], key_h[:, None], key_w[:, None], K_H, K_W)
                b_score = scores(b_score, p_bias, o_bias, b_inside, scale, HAS_BIAS)
                b_weight = exponential(b_score, b_lse[None, :], EXACT)
                b_grad_value = product(b_weight.to(b_grad.dtype), b_grad, b_grad_value, PRECISION, INTERPRETED)
                b_grad_score = product(b_value, tl.trans(b_grad), b_zero, PRECISION, INTERPRETED)
                b_grad_score = (b_weight * (b_grad_score - b_delta[None, :])).to(b_query.dtype)
                b_grad_key = product(b_grad_score, b_query, b_grad_key, PRECISION, INTERPRETED)
        o_out, _ = output_offsets(
            batch, head, key_h, key_w, class_h, class_w, height, width, heads, dilation_h, dilation_w, HEAD_DIM
        )
        store_rows(p_grad_key, o_out, b_grad_key * scale, b_own, HEAD_DIM, BLOCK_D)
        store_rows(p_grad_value, o_out, b_grad_value, b_own, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def backward_classes(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_out,
    p_lse,
    p_grad,
    p_grad_query,
    p_grad_key,
    p_grad_value,
    p_partial,
    scale,
    heads,
    height,
    width,
    dilation_h,
    dilation_w,
    items,
    slices,
    stride_b,
    stride_h,
    stride_w,
    stride_n,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    LENGTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All gradients of every `slices`-th class of one head, from the program's slice on.

    The gradient of the scores, summed over these classes, goes to `p_partial` (slices, heads, LENGTH, LENGTH).
    """
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    head = program % heads
    o_m = tl.arange(0, LENGTH)
    member_h, member_w, b_real = class_rows(o_m, K_H, K_W)
    if HAS_BIAS:
        p_bias += head * ((2 * K_H - 1) * (2 * K_W - 1))
        o_bias = bias_offset(member_h[:, None], member_w[:, None], member_h[None, :], member_w[None, :], K_H, K_W)
        b_bias = tl.load(p_bias + o_bias, mask=b_real[None, :], other=float("-inf"))
        b_partial = tl.zeros([LENGTH, LENGTH], tl.float32)
    step_h = stride_h.to(tl.int64) * dilation_h
    step_w = stride_w.to(tl.int64) * dilation_w
    o_rows = member_offset(member_h, member_w, step_h, step_w, VECTOR)
    for number in range(program // heads, items, slices):
        batch, class_h, class_w, _, _ = locate_class(number, height, width, dilation_h, dilation_w)
        o_map = map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR)
        o_out, o_row = output_offsets(
            batch, head, member_h, member_w, class_h, class_w, height, width, heads, dilation_h, dilation_w, HEAD_DIM
        )
        b_query = load_rows(p_query + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
        b_key = load_rows(p_key + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
        b_value = load_rows(p_value + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
        b_grad = load_rows(p_grad, o_out, b_real, HEAD_DIM, BLOCK_D)
        b_out = load_rows(p_out, o_out, b_real, HEAD_DIM, BLOCK_D)
        b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        b_lse = tl.load(p_lse + o_row, mask=b_real, other=float("inf"))
        b_zero = tl.zeros([LENGTH, LENGTH], tl.float32)
        b_none = tl.zeros([LENGTH, BLOCK_D], tl.float32)
        b_score = product(b_query, tl.trans(b_key), b_zero, PRECISION, INTERPRETED)
        if HAS_BIAS:
            b_score = b_score * scale + b_bias
        else:
            b_score = tl.where(b_real[None, :], b_score * scale, float("-inf"))
        b_weight = exponential(b_score, b_lse[:, None], EXACT)
        b_grad_value = product(tl.trans(b_weight.to(b_grad.dtype)), b_grad, b_none, PRECISION, INTERPRETED)
        store_rows(p_grad_value, o_out, b_grad_value, b_real, HEAD_DIM, BLOCK_D)
        b_grad_score = product(b_grad, tl.trans(b_value), b_zero, PRECISION, INTERPRETED)
        b_grad_score = b_weight * (b_grad_score - b_delta[:, None])
        if HAS_BIAS:
            b_partial += b_grad_score
        b_grad_score = b_grad_score.to(b_key.dtype)
        b_grad_query = product(b_grad_score, b_key, b_none, PRECISION, INTERPRETED)
        store_rows(p_grad_query, o_out, b_grad_query * scale, b_real, HEAD_DIM, BLOCK_D)
        b_grad_key = product(tl.trans(b_grad_score), b_query, b_none, PRECISION, INTERPRETED)
        store_rows(p_grad_key, o_out, b_grad_key * scale, b_real, HEAD_DIM, BLOCK_D)
    if HAS_BIAS:
        p_partial += program.to(tl.int64) * (LENGTH * LENGTH)
        tl.store(p_partial + o_m[:, None] * LENGTH + o_m[None, :], b_partial)


@triton.jit
def reduce_tiles(
    p_partial,
    p_grad_bias,
    BEFORE_W: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_W: tl.constexpr,
    BINS: tl.constexpr,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the diagonals of (heads, BINS, TILE_W, WIDTH): one program per head, bias row and BLOCK bias columns."""
    head = tl.program_id(0).to(tl.int64)
    bias_h = tl.program_id(1)
    bias_w = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for query_w in range(TILE_W):
        column = query_w + bias_w - (K_W - 1) + BEFORE_W
        b_real = (column >= 0) & (column < WIDTH) & (bias_w < 2 * K_W - 1)
        o_partial = ((head * BINS + bias_h) * TILE_W + query_w) * WIDTH
        b_sum += tl.load(p_partial + o_partial + column, mask=b_real, other=0.0)
    o_bias = (head * (2 * K_H - 1) + bias_h) * (2 * K_W - 1) + bias_w
    tl.store(p_grad_bias + o_bias, b_sum.to(p_grad_bias.dtype.element_ty), mask=bias_w < 2 * K_W - 1)


@triton.jit
def reduce_classes(
    p_partial, p_grad_bias, K_H: tl.constexpr, K_W: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum (heads, LENGTH, LENGTH) by key minus query: one program per head."""
    head = tl.program_id(0).to(tl.int64)
    o_bias = tl.arange(0, BLOCK)
    apart_h = o_bias // (2 * K_W - 1) - (K_H - 1)
    apart_w = o_bias % (2 * K_W - 1) - (K_W - 1)
    b_entry = o_bias < (2 * K_H - 1) * (2 * K_W - 1)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for query in range(K_H * K_W):
        key_h = query // K_W + apart_h
        key_w = query % K_W + apart_w
        b_real = b_entry & (key_h >= 0) & (key_h < K_H) & (key_w >= 0) & (key_w < K_W)
        o_partial = (head * LENGTH + query) * LENGTH + key_h * K_W + key_w
        b_sum += tl.load(p_partial + o_partial, mask=b_real, other=0.0)
    o_grad = head * ((2 * K_H - 1) * (2 * K_W - 1)) + o_bias
    tl.store(p_grad_bias + o_grad, b_sum.to(p_grad_bias.dtype.element_ty), mask=b_entry)

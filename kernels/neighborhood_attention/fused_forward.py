"""Triton kernels of the forward pass: tiles of a class with a halo of keys, and whole classes (grid attention).

Source: Faster Neighborhood Attention, arXiv 2403.04690, for the tiling; FlashAttention-2, arXiv 2307.08691, for the
running softmax.
"""

import triton
import triton.language as tl

from terrazzo.kernels.neighborhood_attention.fused_common import (
    bias_offset,
    class_rows,
    in_window,
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
from terrazzo.kernels.triton_host.fused_tiles import (
    LOG2_E,
    LOWEST,
    exponential,
    load_rows,
    product,
    softmax_step,
    store_rows,
)

# Map sizes change from call to call. Without specialization, Triton does not recompile a kernel for multiples of 16.
_SIZES = ["height", "width", "dilation_h", "dilation_w", "tiles_h", "tiles_w", "heads"]


@triton.jit(do_not_specialize=_SIZES)
def forward_tiles(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_out,
    p_lse,
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
    CHUNKS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One TILE_H x TILE_W tile of queries of one class, image and head, against ROWS x COLUMNS keys at a time."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    head = program % heads
    item, class_h, class_w, members_h, members_w = locate_class(program // heads, height, width, dilation_h, dilation_w)
    batch, first_h, first_w, origin_h, origin_w = locate_tile(
        item, tiles_h, tiles_w, members_h, members_w, TILE_H, TILE_W
    )
    if (first_h < members_h) & (first_w < members_w):  # a shorter class may have one tile less
        o_m = tl.arange(0, TILE_H * TILE_W)
        query_h, query_w, b_own = tile_members(o_m, first_h, first_w, origin_h, origin_w, members_h, members_w, TILE_W)
        start_h = query_window(query_h, members_h, K_H)
        start_w = query_window(query_w, members_w, K_W)

        o_map = map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR)
        step_h = stride_h.to(tl.int64) * dilation_h
        step_w = stride_w.to(tl.int64) * dilation_w
        o_query = member_offset(query_h, query_w, step_h, step_w, VECTOR)
        b_query = load_rows(p_query + o_map, o_query, b_own, HEAD_DIM, BLOCK_D)
        if HAS_BIAS:
            p_bias += head * ((2 * K_H - 1) * (2 * K_W - 1))

        b_max = tl.full([TILE_H * TILE_W], LOWEST, tl.float32)
        b_sum = tl.zeros([TILE_H * TILE_W], tl.float32)
        b_out = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        o_n = tl.arange(0, ROWS * COLUMNS)
        row_begin = window_start(first_h, members_h, K_H)
        row_end = window_start(tl.minimum(origin_h + TILE_H, members_h) - 1, members_h, K_H) + K_H
        column_begin = window_start(first_w, members_w, K_W)
        for chunk in range(CHUNKS_W):
            key_w = column_begin + chunk * COLUMNS + o_n % COLUMNS
            b_real_w = key_w < members_w
            b_inside_w = in_window(start_w[:, None], key_w[None, :], K_W)
            for row in range(row_begin, row_end, ROWS):
                key_h = row + o_n // COLUMNS
                o_key = member_offset(key_h, key_w, step_h, step_w, VECTOR)
                b_real = b_real_w & (key_h < members_h)
                b_key = load_rows(p_key + o_map, o_key, b_real, HEAD_DIM, BLOCK_D)
                b_score = product(
                    b_query,
                    tl.trans(b_key),
                    tl.zeros([TILE_H * TILE_W, ROWS * COLUMNS], tl.float32),
                    PRECISION,
                    INTERPRETED,
                )
                b_inside = in_window(start_h[:, None], key_h[None, :], K_H) & b_inside_w
                o_bias = bias_offset(query_h[:, None], query_w[:, None], key_h[None, :], key_w[None, :], K_H, K_W)
                b_score = scores(b_score, p_bias, o_bias, b_inside, scale, HAS_BIAS)
                b_value = load_rows(p_value + o_map, o_key, b_real, HEAD_DIM, BLOCK_D)

                b_weight, b_decay, b_max, b_sum = softmax_step(b_score, b_max, b_sum, EXACT)
                b_out = product(b_weight.to(b_value.dtype), b_value, b_out * b_decay[:, None], PRECISION, INTERPRETED)

        o_out, o_lse = output_offsets(
            batch, head, query_h, query_w, class_h, class_w, height, width, heads, dilation_h, dilation_w, HEAD_DIM
        )
        store_rows(p_out, o_out, b_out / b_sum[:, None], b_own, HEAD_DIM, BLOCK_D)
        tl.store(p_lse + o_lse, b_max + tl.log2(b_sum) / LOG2_E, mask=b_own)


@triton.jit(do_not_specialize=_SIZES)
def forward_classes(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_out,
    p_lse,
    scale,
    heads,
    height,
    width,
    dilation_h,
    dilation_w,
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
    """One whole class of K_H x K_W members of one image and head: dense attention in one block, no window."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    head = program % heads
    batch, class_h, class_w, _, _ = locate_class(program // heads, height, width, dilation_h, dilation_w)
    o_m = tl.arange(0, LENGTH)
    member_h, member_w, b_real = class_rows(o_m, K_H, K_W)
    o_map = map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR)
    step_h = stride_h.to(tl.int64) * dilation_h
    step_w = stride_w.to(tl.int64) * dilation_w
    o_rows = member_offset(member_h, member_w, step_h, step_w, VECTOR)
    b_query = load_rows(p_query + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
    b_key = load_rows(p_key + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
    b_value = load_rows(p_value + o_map, o_rows, b_real, HEAD_DIM, BLOCK_D)
    b_score = product(b_query, tl.trans(b_key), tl.zeros([LENGTH, LENGTH], tl.float32), PRECISION, INTERPRETED)
    if HAS_BIAS:
        p_bias += head * ((2 * K_H - 1) * (2 * K_W - 1))
    o_bias = bias_offset(member_h[:, None], member_w[:, None], member_h[None, :], member_w[None, :], K_H, K_W)
    b_score = scores(b_score, p_bias, o_bias, b_real[None, :], scale, HAS_BIAS)
    b_max = tl.max(b_score, 1)
    b_weight = exponential(b_score, b_max[:, None], EXACT)
    b_sum = tl.sum(b_weight, 1)
    b_out = product(
        b_weight.to(b_value.dtype), b_value, tl.zeros([LENGTH, BLOCK_D], tl.float32), PRECISION, INTERPRETED
    )
    o_out, o_lse = output_offsets(
        batch, head, member_h, member_w, class_h, class_w, height, width, heads, dilation_h, dilation_w, HEAD_DIM
    )
    store_rows(p_out, o_out, b_out / b_sum[:, None], b_real, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + o_lse, b_max + tl.log2(b_sum) / LOG2_E, mask=b_real)

"""Triton kernels of attention within sequences: a program owns some tokens of one sequence and head.

The longest sequence decides the number of programs; programs past the end of a shorter sequence do nothing.

Source: FlashAttention-2, arXiv 2307.08691, for the running softmax and for weights recomputed in the backward pass.
Names: pointers `p_`, blocks `b_`, offsets `o_`; N counts queries, L keys. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import (
    LOG2_E,
    LOWEST,
    exponential,
    load_rows,
    masked_scores,
    product,
    softmax_step,
    store_rows,
)

_ANY = ["heads", "tiles"]


@triton.jit
def locate(p_offsets, heads, tiles):
    """Where a program's sequence begins and ends, its head, and its tile; tiles vary fastest."""
    program = tl.program_id(0)
    sequence = program // tiles // heads
    begin = tl.load(p_offsets + sequence)
    end = tl.load(p_offsets + sequence + 1)
    return begin, end, (program // tiles % heads).to(tl.int64), program % tiles


@triton.jit
def rows(p_base, head, o_rows, b_real, stride_n, stride_h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load vectors of one head."""
    return load_rows(p_base + head * stride_h, o_rows.to(tl.int64) * stride_n, b_real, HEAD_DIM, BLOCK_D)


@triton.jit
def packed(o_rows, head, heads, HEAD_DIM: tl.constexpr):
    """Offsets of vectors in a contiguous (tokens, heads, HEAD_DIM)."""
    return (o_rows.to(tl.int64) * heads + head) * HEAD_DIM


@triton.jit(do_not_specialize=_ANY)
def forward(
    p_query,
    p_key,
    p_value,
    p_offsets,
    p_out,
    p_lse,
    scale,
    heads,
    tiles,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N queries against BLOCK_L keys at a time."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    begin, end, head, tile = locate(p_offsets, heads, tiles)
    if begin + tile * BLOCK_N < end:
        o_n = begin + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        b_own = o_n < end
        b_query = rows(p_query, head, o_n, b_own, stride_qn, stride_qh, HEAD_DIM, BLOCK_D)
        b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK_L):
            o_l = first + tl.arange(0, BLOCK_L)
            b_real = o_l < end
            b_key = rows(p_key, head, o_l, b_real, stride_kn, stride_kh, HEAD_DIM, BLOCK_D)
            b_value = rows(p_value, head, o_l, b_real, stride_vn, stride_vh, HEAD_DIM, BLOCK_D)
            b_score = masked_scores(b_query, b_key, b_real, scale, PRECISION, INTERPRETED)
            b_weight, b_decay, b_max, b_sum = softmax_step(b_score, b_max, b_sum, EXACT)
            b_out = product(b_weight.to(b_value.dtype), b_value, b_out * b_decay[:, None], PRECISION, INTERPRETED)
        store_rows(p_out, packed(o_n, head, heads, HEAD_DIM), b_out / b_sum[:, None], b_own, HEAD_DIM, BLOCK_D)
        tl.store(p_lse + packed(o_n, head, heads, 1), b_max + tl.log2(b_sum) / LOG2_E, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def backward_queries(
    p_query,
    p_key,
    p_value,
    p_offsets,
    p_out,
    p_lse,
    p_grad,
    p_delta,
    p_grad_query,
    scale,
    heads,
    tiles,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradient of BLOCK_N queries, and each row's `delta`, the weighted mean of its weights' gradients."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    begin, end, head, tile = locate(p_offsets, heads, tiles)
    if begin + tile * BLOCK_N < end:
        o_n = begin + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        b_own = o_n < end
        b_query = rows(p_query, head, o_n, b_own, stride_qn, stride_qh, HEAD_DIM, BLOCK_D)
        o_out = packed(o_n, head, heads, HEAD_DIM)
        b_grad = load_rows(p_grad, o_out, b_own, HEAD_DIM, BLOCK_D)
        b_out = load_rows(p_out, o_out, b_own, HEAD_DIM, BLOCK_D)
        b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        o_row = packed(o_n, head, heads, 1)
        tl.store(p_delta + o_row, b_delta, mask=b_own)
        b_lse = tl.load(p_lse + o_row, mask=b_own, other=float("inf"))
        b_grad_query = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK_L):
            o_l = first + tl.arange(0, BLOCK_L)
            b_real = o_l < end
            b_key = rows(p_key, head, o_l, b_real, stride_kn, stride_kh, HEAD_DIM, BLOCK_D)
            b_value = rows(p_value, head, o_l, b_real, stride_vn, stride_vh, HEAD_DIM, BLOCK_D)
            b_score = masked_scores(b_query, b_key, b_real, scale, PRECISION, INTERPRETED)
            b_weight = exponential(b_score, b_lse[:, None], EXACT)
            b_zero = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
            b_pair = b_weight * (product(b_grad, tl.trans(b_value), b_zero, PRECISION, INTERPRETED) - b_delta[:, None])
            b_grad_query = product(b_pair.to(b_key.dtype), b_key, b_grad_query, PRECISION, INTERPRETED)
        store_rows(p_grad_query, o_out, b_grad_query * scale, b_own, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_ANY)
def backward_keys(
    p_query,
    p_key,
    p_value,
    p_offsets,
    p_lse,
    p_grad,
    p_delta,
    p_grad_key,
    p_grad_value,
    scale,
    heads,
    tiles,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradients of BLOCK_L keys and their values, against BLOCK_N queries at a time."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    begin, end, head, tile = locate(p_offsets, heads, tiles)
    if begin + tile * BLOCK_L < end:
        o_l = begin + tile * BLOCK_L + tl.arange(0, BLOCK_L)
        b_own = o_l < end
        b_key = rows(p_key, head, o_l, b_own, stride_kn, stride_kh, HEAD_DIM, BLOCK_D)
        b_value = rows(p_value, head, o_l, b_own, stride_vn, stride_vh, HEAD_DIM, BLOCK_D)
        b_grad_key = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        b_grad_value = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for first in range(begin, end, BLOCK_N):
            o_n = first + tl.arange(0, BLOCK_N)
            b_real = o_n < end
            b_query = rows(p_query, head, o_n, b_real, stride_qn, stride_qh, HEAD_DIM, BLOCK_D)
            b_grad = load_rows(p_grad, packed(o_n, head, heads, HEAD_DIM), b_real, HEAD_DIM, BLOCK_D)
            o_row = packed(o_n, head, heads, 1)
            b_delta = tl.load(p_delta + o_row, mask=b_real, other=0.0)
            b_lse = tl.load(p_lse + o_row, mask=b_real, other=0.0)
            # Keys are the first factor: in float32 a product keeps its whole second factor in registers over the loop.
            b_score = masked_scores(b_key, b_query, b_real, scale, PRECISION, INTERPRETED)
            b_weight = exponential(b_score, b_lse[None, :], EXACT)
            b_grad_value = product(b_weight.to(b_grad.dtype), b_grad, b_grad_value, PRECISION, INTERPRETED)
            b_zero = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
            b_pair = b_weight * (product(b_value, tl.trans(b_grad), b_zero, PRECISION, INTERPRETED) - b_delta[None, :])
            b_grad_key = product(b_pair.to(b_query.dtype), b_query, b_grad_key, PRECISION, INTERPRETED)
        o_out = packed(o_l, head, heads, HEAD_DIM)
        store_rows(p_grad_key, o_out, b_grad_key * scale, b_own, HEAD_DIM, BLOCK_D)
        store_rows(p_grad_value, o_out, b_grad_value, b_own, HEAD_DIM, BLOCK_D)

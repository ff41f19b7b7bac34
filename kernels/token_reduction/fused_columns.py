"""Triton kernels of the attention that each key receives: sums of rows, then of columns, without the whole matrix.

A program owns some queries, or some keys, of one head; nothing is added up by atomics.
Names: pointers `p_`, blocks `b_`, offsets `o_`. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import LOG2_E, LOWEST, exponential, load_rows, masked_scores, softmax_step

_ANY = ["heads", "count", "tiles"]


@triton.jit
def locate(heads, tiles):
    """Image, head and tile of a program. Tiles vary fastest, because the tiles of a head read the same tensors."""
    program = tl.program_id(0)
    return (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64), program % tiles


@triton.jit(do_not_specialize=_ANY)
def row_sums(
    p_query,
    p_key,
    p_bias,
    p_lse,
    scale,
    heads,
    count,
    tiles,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The logarithm of the sum of exponentials in the rows of BLOCK_N queries, (B, H, count)."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    image, head, tile = locate(heads, tiles)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_own = o_n < count
    p_query += image * stride_qb + head * stride_qh
    p_key += image * stride_kb + head * stride_kh
    b_query = load_rows(p_query, o_n.to(tl.int64) * stride_qn, b_own, HEAD_DIM, BLOCK_D)
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, count, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        b_real = o_l < count
        b_key = load_rows(p_key, o_l.to(tl.int64) * stride_kn, b_real, HEAD_DIM, BLOCK_D)
        b_score = masked_scores(b_query, b_key, b_real, scale, PRECISION, INTERPRETED)
        if HAS_BIAS:
            b_score += tl.load(p_bias + image * count + o_l, mask=b_real, other=0.0)[None, :]
        _, _, b_max, b_sum = softmax_step(b_score, b_max, b_sum, EXACT)
    tl.store(p_lse + (image * heads + head) * count + o_n, b_max + tl.log2(b_sum) / LOG2_E, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def column_sums(
    p_query,
    p_key,
    p_bias,
    p_lse,
    p_sum,
    scale,
    heads,
    count,
    tiles,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sum over all queries of the weights of BLOCK_L keys, (B, H, count)."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    image, head, tile = locate(heads, tiles)
    o_l = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    b_own = o_l < count
    p_query += image * stride_qb + head * stride_qh
    p_key += image * stride_kb + head * stride_kh
    p_lse += (image * heads + head) * count
    b_key = load_rows(p_key, o_l.to(tl.int64) * stride_kn, b_own, HEAD_DIM, BLOCK_D)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + image * count + o_l, mask=b_own, other=0.0)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, count, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        b_real = o_n < count
        b_query = load_rows(p_query, o_n.to(tl.int64) * stride_qn, b_real, HEAD_DIM, BLOCK_D)
        # Keys are the first factor: in float32 a product keeps its whole second factor in registers over the loop.
        b_score = masked_scores(b_key, b_query, b_real, scale, PRECISION, INTERPRETED)
        if HAS_BIAS:
            b_score += b_bias[:, None]
        b_lse = tl.load(p_lse + o_n, mask=b_real, other=0.0)
        b_sum += tl.sum(exponential(b_score, b_lse[None, :], EXACT), 1)
    tl.store(p_sum + (image * heads + head) * count + o_l, b_sum, mask=b_own)

"""Triton kernels of softmax-free attention: sums over Gaussian kernels, and their gradients.

A program owns a block of rows of one image and head: tokens that read from landmarks, or landmarks that collect from
tokens. The two differ in nothing but their lengths, so one kernel serves both. Loads past an end give vectors of 0,
which add nothing to a sum, so weights need no mask.

Names: pointers `p_`, blocks `b_`, offsets `o_`.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import LOG2_E, load_rows, product, store_rows

# Not specialized: lengths change from call to call.
_ANY = ["rows", "others", "heads", "blocks", "splits", "length"]


@triton.jit
def locate(program, blocks, heads, splits):
    """Image, head, block of rows and split of a program."""
    item = program // blocks // splits
    return item // heads, item % heads, program % blocks, program // blocks % splits


@triton.jit
def base(p_tensor, batch, head, stride_b, stride_h):
    """The first row of an image and head."""
    return p_tensor + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def vectors(p_base, o_rows, count, stride_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows in float32; 0 past the last row."""
    return load_rows(p_base, o_rows.to(tl.int64) * stride_n, o_rows < count, HEAD_DIM, BLOCK_D).to(tl.float32)


@triton.jit
def weights(b_own, b_other, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """exp(-|x - y|^2 / 2) of own rows and others."""
    b_zero = tl.zeros([b_own.shape[0], b_other.shape[0]], tl.float32)
    b_cross = product(b_own, tl.trans(b_other), b_zero, PRECISION, INTERPRETED)
    b_half = tl.sum(b_own * b_own, 1)[:, None] * 0.5 + tl.sum(b_other * b_other, 1)[None, :] * 0.5
    return tl.exp2(tl.minimum(b_cross - b_half, 0.0) * LOG2_E)


@triton.jit(do_not_specialize=_ANY)
def sums(
    p_own,
    p_other,
    p_vector,
    p_out,
    rows,
    others,
    heads,
    blocks,
    splits,
    length,
    stride_ob,
    stride_oh,
    stride_on,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_rs,
    stride_rb,
    stride_rh,
    stride_rn,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N rows: the sum of w_ij vector_j over a split of `length` others j, BLOCK_L at a time."""
    batch, head, block, split = locate(tl.program_id(0), blocks, heads, splits)
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b_own = vectors(base(p_own, batch, head, stride_ob, stride_oh), o_n, rows, stride_on, HEAD_DIM, BLOCK_D)
    p_other = base(p_other, batch, head, stride_xb, stride_xh)
    p_vector = base(p_vector, batch, head, stride_vb, stride_vh)
    b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(split * length, tl.minimum(others, (split + 1) * length), BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        b_other = vectors(p_other, o_l, others, stride_xn, HEAD_DIM, BLOCK_D)
        b_vector = vectors(p_vector, o_l, others, stride_vn, HEAD_DIM, BLOCK_D)
        b_weight = weights(b_own, b_other, PRECISION, INTERPRETED)
        b_out = product(b_weight, b_vector, b_out, PRECISION, INTERPRETED)
    p_out = base(p_out, batch, head, stride_rb, stride_rh) + split.to(tl.int64) * stride_rs
    store_rows(p_out, o_n.to(tl.int64) * stride_rn, b_out, o_n < rows, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_ANY)
def gradients(
    p_own,
    p_mine,
    p_other,
    p_vector,
    p_grad,
    p_sums,
    rows,
    others,
    heads,
    blocks,
    splits,
    length,
    stride_ob,
    stride_oh,
    stride_on,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_rs,
    stride_rb,
    stride_rh,
    stride_rn,
    WITH_SUMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N rows: the sum of w_ij <mine_i, vector_j> (other_j - own_i), and with WITH_SUMS that of `sums`.

    The first is the gradient of the sum of w_ij <mine_i, vector_j> by own_i.
    """
    batch, head, block, split = locate(tl.program_id(0), blocks, heads, splits)
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b_own = vectors(base(p_own, batch, head, stride_ob, stride_oh), o_n, rows, stride_on, HEAD_DIM, BLOCK_D)
    b_mine = vectors(base(p_mine, batch, head, stride_mb, stride_mh), o_n, rows, stride_mn, HEAD_DIM, BLOCK_D)
    p_other = base(p_other, batch, head, stride_xb, stride_xh)
    p_vector = base(p_vector, batch, head, stride_vb, stride_vh)
    b_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    b_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(split * length, tl.minimum(others, (split + 1) * length), BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        b_other = vectors(p_other, o_l, others, stride_xn, HEAD_DIM, BLOCK_D)
        b_vector = vectors(p_vector, o_l, others, stride_vn, HEAD_DIM, BLOCK_D)
        b_weight = weights(b_own, b_other, PRECISION, INTERPRETED)
        if WITH_SUMS:
            b_sums = product(b_weight, b_vector, b_sums, PRECISION, INTERPRETED)
        b_zero = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        b_weight *= product(b_mine, tl.trans(b_vector), b_zero, PRECISION, INTERPRETED)
        b_grad = product(b_weight, b_other, b_grad, PRECISION, INTERPRETED)
        b_total += tl.sum(b_weight, 1)
    o_out = o_n.to(tl.int64) * stride_rn
    p_grad = base(p_grad, batch, head, stride_rb, stride_rh) + split.to(tl.int64) * stride_rs
    store_rows(p_grad, o_out, b_grad - b_total[:, None] * b_own, o_n < rows, HEAD_DIM, BLOCK_D)
    if WITH_SUMS:
        p_sums = base(p_sums, batch, head, stride_rb, stride_rh) + split.to(tl.int64) * stride_rs
        store_rows(p_sums, o_out, b_sums, o_n < rows, HEAD_DIM, BLOCK_D)

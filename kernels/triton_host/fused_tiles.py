"""Building blocks of all Triton kernels: products, softmax and rows of vectors. Imported at first use only.

Names: pointers `p_`, blocks `b_`, offsets `o_`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(b_left, b_right, b_sum, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """b_sum + b_left @ b_right in float32."""
    if INTERPRETED:  # Triton's interpreter would multiply the bit patterns of bfloat16
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def exponential(b_score, b_row, EXACT: tl.constexpr):
    """exp(b_score - b_row). EXACT (float32) subtracts first; half precision uses one multiply-add."""
    if EXACT:
        return tl.exp2((b_score - b_row) * LOG2_E)
    return tl.exp2(b_score * LOG2_E - b_row * LOG2_E)


# A finite start of a running maximum, so that a row that begins with masked keys never computes -inf minus -inf.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def softmax_step(b_score, b_max, b_sum, EXACT: tl.constexpr):
    """Add a block of keys to a running softmax: their weights, the decay of earlier sums, the new maximum and sum."""
    b_new = tl.maximum(b_max, tl.max(b_score, 1))
    b_weight = exponential(b_score, b_new[:, None], EXACT)
    b_decay = tl.exp2((b_max - b_new) * LOG2_E)
    return b_weight, b_decay, b_new, b_sum * b_decay + tl.sum(b_weight, 1)


@triton.jit
def masked_scores(b_own, b_other, b_real, scale, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """(own, other): scaled products of queries and keys, or of keys and queries; -inf where `other` is not real."""
    b_zero = tl.zeros([b_own.shape[0], b_other.shape[0]], tl.float32)
    b_score = product(b_own, tl.trans(b_other), b_zero, PRECISION, INTERPRETED) * scale
    return tl.where(b_real[None, :], b_score, float("-inf"))


@triton.jit
def load_rows(p_base, o_rows, b_real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows as (len(o_rows), BLOCK_D); zero where a row is not real, and past head_dim."""
    o_d = tl.arange(0, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(p_base + o_rows[:, None] + o_d[None, :], mask=b_real[:, None], other=0.0)
    return tl.load(p_base + o_rows[:, None] + o_d[None, :], mask=b_real[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(p_base, o_rows, b_rows, b_real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    b_mask = b_real[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_base + o_rows[:, None] + o_d[None, :], b_rows.to(p_base.dtype.element_ty), mask=b_mask)

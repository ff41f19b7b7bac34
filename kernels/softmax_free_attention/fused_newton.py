"""Triton kernels of Newton's iteration towards an inverse: a program takes all steps of one matrix.

A product reads its factors from memory, a few columns and rows at a time: whole factors would not fit in registers.
Programs write where they alone read, and wait at a barrier in between; the matrices stay in the nearest cache. The
matrix and its inverse are symmetric, so gradients need no transposed factor.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import product

_ANY = ["size", "matrices"]


@triton.jit
def place(slot, matrix, matrices, size):
    """The offset of a matrix in a slot of all matrices."""
    return (slot.to(tl.int64) * matrices + matrix) * size * size


@triton.jit
def elements(size, BLOCK: tl.constexpr):
    """Offsets of a matrix's elements, and which of them exist."""
    o_row = tl.arange(0, BLOCK)
    return o_row[:, None] * size + o_row[None, :], (o_row < size)[:, None] & (o_row < size)[None, :]


@triton.jit
def times(
    p_left,
    p_right,
    b_sum,
    size,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """b_sum + left @ right."""
    o_row = tl.arange(0, BLOCK)
    for first in range(0, size, CHUNK):
        o_k = first + tl.arange(0, CHUNK)
        b_columns = (o_row < size)[:, None] & (o_k < size)[None, :]
        b_rows = (o_k < size)[:, None] & (o_row < size)[None, :]
        b_left = tl.load(p_left + o_row[:, None] * size + o_k[None, :], mask=b_columns, other=0.0)
        b_right = tl.load(p_right + o_k[:, None] * size + o_row[None, :], mask=b_rows, other=0.0)
        b_sum = product(b_left, b_right, b_sum, PRECISION, INTERPRETED)
    return b_sum


@triton.jit(do_not_specialize=_ANY)
def newton(
    p_matrix,
    p_alpha,
    p_path,
    p_left,
    p_out,
    size,
    matrices,
    STEPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """STEPS of V <- 2 V - V A V from alpha A. The last SLOTS matrices, without the result, stay in `p_path`."""
    matrix = tl.program_id(0)
    o_own = place(matrix * 0, matrix, matrices, size)
    o_all, b_real = elements(size, BLOCK)
    p_matrix += o_own
    p_left += o_own
    b_inverse = tl.load(p_alpha + matrix) * tl.load(p_matrix + o_all, mask=b_real, other=0.0)
    for step in range(STEPS):
        p_inverse = p_path + place(matrix * 0 + step % SLOTS, matrix, matrices, size)
        tl.store(p_inverse + o_all, b_inverse, mask=b_real)
        tl.debug_barrier()
        b_zero = tl.zeros([BLOCK, BLOCK], tl.float32)
        b_left = times(p_inverse, p_matrix, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        tl.store(p_left + o_all, b_left, mask=b_real)
        tl.debug_barrier()
        b_both = times(p_left, p_inverse, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        b_inverse = 2 * b_inverse - b_both
    tl.store(p_out + o_own + o_all, b_inverse, mask=b_real)


@triton.jit(do_not_specialize=_ANY)
def newton_backward(
    p_grad,
    p_matrix,
    p_path,
    p_work,
    p_grad_matrix,
    p_grad_start,
    size,
    matrices,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Gradients through all steps by the matrix and by the iteration's start, from the path that `newton` kept.

    `p_work` has four slots: the gradient by V, in turns in the first two; then V dV, and dV V.
    """
    matrix = tl.program_id(0)
    none = matrix * 0
    o_own = place(none, matrix, matrices, size)
    o_all, b_real = elements(size, BLOCK)
    p_matrix += o_own
    p_before = p_work + place(none + 2, matrix, matrices, size)
    p_after = p_work + place(none + 3, matrix, matrices, size)
    b_grad = tl.load(p_grad + o_own + o_all, mask=b_real, other=0.0)
    b_zero = tl.zeros([BLOCK, BLOCK], tl.float32)
    b_grad_matrix = tl.zeros([BLOCK, BLOCK], tl.float32)
    for back in range(STEPS):
        p_inverse = p_path + place(none + (STEPS - 1 - back), matrix, matrices, size)
        p_own = p_work + place(none + back % 2, matrix, matrices, size)
        tl.store(p_own + o_all, b_grad, mask=b_real)
        tl.debug_barrier()
        b_before = times(p_inverse, p_own, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        tl.store(p_before + o_all, b_before, mask=b_real)
        b_after = times(p_own, p_inverse, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        tl.store(p_after + o_all, b_after, mask=b_real)
        tl.debug_barrier()
        b_lost = times(p_after, p_matrix, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        b_lost = times(p_matrix, p_before, b_lost, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
        b_grad = 2 * b_grad - b_lost
        b_grad_matrix -= times(p_before, p_inverse, b_zero, size, BLOCK, CHUNK, PRECISION, INTERPRETED)
    tl.store(p_grad_matrix + o_own + o_all, b_grad_matrix, mask=b_real)
    tl.store(p_grad_start + o_own + o_all, b_grad, mask=b_real)

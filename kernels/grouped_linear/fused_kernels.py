"""Triton kernels of grouped linear layers: products of rows with their group's matrix, and the matrices' gradients.

Programs go through the groups one after another, so that the matrix of a group is read while it is in the cache
(Edge-MoE, arXiv 2305.18691: expert by expert). A group is padded to whole blocks in the count of programs only.

Names: pointers `p_`, blocks `b_`, offsets `o_`; E counts groups, N rows, O channels out, I channels in. Addresses are
64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import product


@triton.jit
def locate(p_offsets, tile, groups, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """The group of a block of rows, the block's first row, and the end of the group; for no block, rows end at 0."""
    o_e = tl.arange(0, BLOCK_E)
    b_begin = tl.load(p_offsets + o_e, mask=o_e < groups, other=0).to(tl.int32)
    b_end = tl.load(p_offsets + o_e + 1, mask=o_e < groups, other=0).to(tl.int32)
    b_tiles = (b_end - b_begin + BLOCK_N - 1) // BLOCK_N
    b_first = tl.cumsum(b_tiles, 0) - b_tiles
    b_own = (b_first <= tile) & (tile < b_first + b_tiles)  # one group, or none
    first = tl.sum(tl.where(b_own, b_begin + (tile - b_first) * BLOCK_N, 0), 0)
    return tl.sum(tl.where(b_own, o_e, 0), 0), first, tl.sum(tl.where(b_own, b_end, 0), 0)


@triton.jit
def block(p_base, o_first, o_second, b_first, b_second, stride_first, stride_second):
    """Load a block of a matrix; zero where a row or column is not real."""
    o_block = o_first.to(tl.int64)[:, None] * stride_first + o_second.to(tl.int64)[None, :] * stride_second
    return tl.load(p_base + o_block, mask=b_first[:, None] & b_second[None, :], other=0.0)


@triton.jit
def rows(
    p_x,
    p_weight,
    p_bias,
    p_offsets,
    p_out,
    groups,
    outs,
    ins,
    stride_xn,
    stride_xi,
    stride_we,
    stride_wo,
    stride_wi,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N rows of one group and BLOCK_O of their channels; the programs of one block of rows are neighbours."""
    columns = (outs + BLOCK_O - 1) // BLOCK_O
    group, first, end = locate(p_offsets, tl.program_id(0) // columns, groups, BLOCK_E, BLOCK_N)
    if first < end:
        o_n = first + tl.arange(0, BLOCK_N)
        o_o = tl.program_id(0) % columns * BLOCK_O + tl.arange(0, BLOCK_O)
        p_weight += group.to(tl.int64) * stride_we
        b_out = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for start in range(0, ins, BLOCK_I):
            o_i = start + tl.arange(0, BLOCK_I)
            b_x = block(p_x, o_n, o_i, o_n < end, o_i < ins, stride_xn, stride_xi)
            b_weight = block(p_weight, o_i, o_o, o_i < ins, o_o < outs, stride_wi, stride_wo)
            b_out = product(b_x, b_weight, b_out, PRECISION, INTERPRETED)
        if HAS_BIAS:
            b_bias = tl.load(p_bias + group.to(tl.int64) * outs + o_o, mask=o_o < outs, other=0.0)
            b_out += b_bias.to(tl.float32)[None, :]
        o_out = o_n.to(tl.int64)[:, None] * outs + o_o[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(o_n < end)[:, None] & (o_o < outs)[None, :])


@triton.jit
def weights(
    p_grad,
    p_x,
    p_offsets,
    p_grad_weight,
    p_grad_bias,
    outs,
    ins,
    stride_gn,
    stride_go,
    stride_xn,
    stride_xi,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradient of BLOCK_O x BLOCK_I elements of one group's matrix, and for the first inputs the bias's."""
    rows_of_blocks = (outs + BLOCK_O - 1) // BLOCK_O
    columns = (ins + BLOCK_I - 1) // BLOCK_I
    place = tl.program_id(0) % (rows_of_blocks * columns)
    group = tl.program_id(0) // (rows_of_blocks * columns)
    begin = tl.load(p_offsets + group).to(tl.int32)
    end = tl.load(p_offsets + group + 1).to(tl.int32)
    o_o = place // columns * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = place % columns * BLOCK_I + tl.arange(0, BLOCK_I)
    b_grad_weight = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_O], tl.float32)
    for first in range(begin, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        b_grad = block(p_grad, o_o, o_n, o_o < outs, o_n < end, stride_go, stride_gn)
        b_x = block(p_x, o_n, o_i, o_n < end, o_i < ins, stride_xn, stride_xi)
        b_grad_weight = product(b_grad, b_x, b_grad_weight, PRECISION, INTERPRETED)
        b_grad_bias += tl.sum(b_grad.to(tl.float32), 1)
    o_row = group.to(tl.int64) * outs + o_o
    o_block = o_row[:, None] * ins + o_i[None, :]
    b_real = (o_o < outs)[:, None] & (o_i < ins)[None, :]
    tl.store(p_grad_weight + o_block, b_grad_weight.to(p_grad_weight.dtype.element_ty), mask=b_real)
    if place % columns == 0:
        tl.store(p_grad_bias + o_row, b_grad_bias.to(p_grad_bias.dtype.element_ty), mask=o_o < outs)

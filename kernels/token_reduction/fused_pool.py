"""Triton kernels of pooling: tokens sorted by group, the groups' weighted means, and the gradient, which is a gather.

A program owns some rows of the output: there are no atomics, and sums are in float32 in the order of the tokens.
Names: pointers `p_`, blocks `b_`, offsets `o_`. Addresses are 64-bit.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32

_ANY = ["count", "groups", "tiles"]


@triton.jit
def share(b_weight, b_total):
    """A token's part of its group's weight; 0 if the group has no weight (padding)."""
    return b_weight / tl.maximum(b_total, TINY)


@triton.jit(do_not_specialize=_ANY)
def sort(p_map, p_order, p_begin, count, groups, tiles, BLOCK: tl.constexpr):
    """Tokens sorted by group, in their order within a group (B, count), and where each group begins (B, groups + 1).

    A program places BLOCK entries, tokens and then group starts. An entry comes after all tokens of lower groups; a
    token also comes after the earlier tokens of its group.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_own = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    p_map += image * count
    b_token = o_own < count
    b_group = tl.where(b_token, tl.load(p_map + o_own, mask=b_token, other=0).to(tl.int32), o_own - count)
    o_until = tl.where(b_token, o_own, 0)
    b_place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        o_other = first + tl.arange(0, BLOCK)
        b_other = tl.load(p_map + o_other, mask=o_other < count, other=groups + 1).to(tl.int32)
        b_tie = (b_other[None, :] == b_group[:, None]) & (o_other[None, :] < o_until[:, None])
        b_place += tl.sum(((b_other[None, :] < b_group[:, None]) | b_tie).to(tl.int32), 1)
    tl.store(p_order + image * count + b_place, o_own, mask=b_token)
    b_begins = (o_own >= count) & (b_group <= groups)
    tl.store(p_begin + image * (groups + 1) + b_group, b_place, mask=b_begins)


@triton.jit(do_not_specialize=_ANY)
def pool(
    p_x,
    p_weight,
    p_size,
    p_order,
    p_begin,
    p_out,
    p_total,
    p_sizes,
    count,
    groups,
    tiles,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Weighted means of BLOCK groups of one image, in BLOCK_C channels, and the groups' weights and sizes."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_group = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_own = o_group < groups
    p_begin += image * (groups + 1)
    b_begin = tl.load(p_begin + o_group, mask=b_own, other=0)
    b_members = tl.load(p_begin + o_group + 1, mask=b_own, other=0) - b_begin
    most = tl.max(b_members, 0)
    p_order += image * count
    p_weight += image * count
    p_size += image * count
    b_total = tl.zeros([BLOCK], tl.float32)
    b_size = tl.zeros([BLOCK], tl.float32)
    for step in range(0, most):
        b_real = step < b_members
        o_token = tl.load(p_order + b_begin + step, mask=b_real, other=0)
        b_total += tl.load(p_weight + o_token, mask=b_real, other=0.0)
        b_size += tl.load(p_size + o_token, mask=b_real, other=0.0)
    b_sum = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for step in range(0, most):
        b_real = step < b_members
        o_token = tl.load(p_order + b_begin + step, mask=b_real, other=0)
        b_share = share(tl.load(p_weight + o_token, mask=b_real, other=0.0), b_total)
        o_x = (image * count + o_token)[:, None] * CHANNELS + o_c[None, :]
        b_x = tl.load(p_x + o_x, mask=b_real[:, None] & (o_c < CHANNELS)[None, :], other=0.0)
        b_sum += b_x.to(tl.float32) * b_share[:, None]
    o_out = (image * groups + o_group)[:, None] * CHANNELS + o_c[None, :]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=b_own[:, None] & (o_c < CHANNELS)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_total + image * groups + o_group, b_total, mask=b_own)
        tl.store(p_sizes + image * groups + o_group, b_size, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def spread(
    p_grad,
    p_map,
    p_weight,
    p_total,
    p_grad_x,
    count,
    groups,
    tiles,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give BLOCK tokens of one image their parts of their groups' gradients, in BLOCK_C channels."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_own = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_own = o_own < count
    o_group = image * groups + tl.load(p_map + image * count + o_own, mask=b_own, other=0)
    b_weight = tl.load(p_weight + image * count + o_own, mask=b_own, other=0.0)
    b_share = share(b_weight, tl.load(p_total + o_group, mask=b_own, other=1.0))
    b_mask = b_own[:, None] & (o_c < CHANNELS)[None, :]
    b_grad = tl.load(p_grad + o_group[:, None] * CHANNELS + o_c[None, :], mask=b_mask, other=0.0).to(tl.float32)
    o_x = (image * count + o_own)[:, None] * CHANNELS + o_c[None, :]
    tl.store(p_grad_x + o_x, (b_grad * b_share[:, None]).to(p_grad_x.dtype.element_ty), mask=b_mask)

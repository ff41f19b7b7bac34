"""Shared parts of the Triton kernels: window arithmetic, where a program works, scores. Imported at first use only.

Names: pointers `p_`, blocks `b_`, offsets `o_`. A position of an axis is member `member` of residue class `residue`
(position = member * dilation + residue); all window arithmetic is in members. Addresses are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def class_members(length, residue, dilation):
    """The number of positions of a residue class; classes of one axis may differ by one."""
    return (length - residue + dilation - 1) // dilation


@triton.jit
def window_start(member, members, K: tl.constexpr):
    """First key of a query's window: shifted inward at both borders."""
    return tl.minimum(tl.maximum(member - K // 2, 0), members - K)


@triton.jit
def in_window(start, key, K: tl.constexpr):
    return (key >= start) & (key < start + K)


@triton.jit
def first_query(member, K: tl.constexpr):
    """First query with a given key in its window. Near the border this is query 0, because windows are shifted."""
    return tl.where(member < K, 0, member - (K - 1 - K // 2))


@triton.jit
def last_query(member, members, K: tl.constexpr):
    """Last query with a given key in its window."""
    return tl.where(member >= members - K, members - 1, member + K // 2)


@triton.jit
def bias_offset(query_h, query_w, key_h, key_w, K_H: tl.constexpr, K_W: tl.constexpr):
    """Offset into the (2 K_H - 1, 2 K_W - 1) table at key minus query. Each side is summed first: one add per pair."""
    o_key = (key_h + K_H - 1) * (2 * K_W - 1) + key_w + K_W - 1
    return o_key - (query_h * (2 * K_W - 1) + query_w)


@triton.jit
def scores(b_product, p_bias, o_bias, b_inside, scale, HAS_BIAS: tl.constexpr):
    """Scaled products plus bias, -inf outside the window."""
    if HAS_BIAS:
        # The mask of the load is the mask of the window, so -inf costs no instruction.
        b_bias = tl.load(p_bias + o_bias, mask=b_inside, other=float("-inf")).to(tl.float32)
        b_score = b_product * scale + b_bias
    else:
        b_score = tl.where(b_inside, b_product * scale, float("-inf"))
    return b_score


@triton.jit
def locate_class(item, height, width, dilation_h, dilation_w):
    """Split an item number. Classes vary fastest, because neighboring classes share cache lines."""
    class_w = item % dilation_w
    item = item // dilation_w
    class_h = item % dilation_h
    members_h = class_members(height, class_h, dilation_h)
    members_w = class_members(width, class_w, dilation_w)
    return item // dilation_h, class_h, class_w, members_h, members_w


@triton.jit
def locate_tile(item, tiles_h, tiles_w, members_h, members_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image of an item, the first members that its tile owns, and the origin of the tile.

    The last tile of an axis is moved inward so that it lies inside its class; this bounds the keys that it needs
    relative to its origin. It repeats members of the tile before, but owns only members from `first` on.
    """
    first_w = (item % tiles_w) * TILE_W
    item = item // tiles_w
    first_h = (item % tiles_h) * TILE_H
    origin_h = tl.minimum(first_h, tl.maximum(members_h - TILE_H, 0))
    origin_w = tl.minimum(first_w, tl.maximum(members_w - TILE_W, 0))
    return item // tiles_h, first_h, first_w, origin_h, origin_w


@triton.jit
def tile_members(o_tile, first_h, first_w, origin_h, origin_w, members_h, members_w, TILE_W: tl.constexpr):
    """Members of a tile, row by row, and which of them it owns. In a class smaller than a tile some do not exist."""
    member_h = origin_h + o_tile // TILE_W
    member_w = origin_w + o_tile % TILE_W
    b_own = (member_h >= first_h) & (member_h < members_h) & (member_w >= first_w) & (member_w < members_w)
    return member_h, member_w, b_own


@triton.jit
def query_window(member, members, K: tl.constexpr):
    """First key of a query's window. For a query that does not exist: beyond all keys, so that no bias is read."""
    return tl.where(member < members, window_start(member, members, K), 1 << 30)


@triton.jit
def class_rows(o_rows, K_H: tl.constexpr, K_W: tl.constexpr):
    """Members of a class of K_H x K_W, row by row, and which rows are real; rows past the end repeat the last one."""
    o_member = tl.minimum(o_rows, K_H * K_W - 1)
    return o_member // K_W, o_member % K_W, o_rows < K_H * K_W


@triton.jit
def output_offsets(
    batch,
    head,
    member_h,
    member_w,
    class_h,
    class_w,
    height,
    width,
    heads,
    dilation_h,
    dilation_w,
    HEAD_DIM: tl.constexpr,
):
    """Offsets of members in contiguous outputs (B, H, W, heads, head_dim), and in contiguous (B, heads, H, W)."""
    position_h = member_h * dilation_h + class_h
    position_w = member_w * dilation_w + class_w
    o_out = (batch.to(tl.int64) * height + position_h) * width + position_w
    o_row = ((batch.to(tl.int64) * heads + head) * height + position_h) * width + position_w
    return (o_out * heads + head) * HEAD_DIM, o_row


@triton.jit
def map_offset(batch, class_h, class_w, head, stride_b, stride_h, stride_w, stride_n, VECTOR: tl.constexpr):
    """Offset of member (0, 0) of a class, for one image and head."""
    o_base = batch.to(tl.int64) * stride_b + class_h.to(tl.int64) * stride_h + class_w.to(tl.int64) * stride_w
    # Every stride is a multiple of VECTOR. Triton detects multiples of 16 by itself, but not of 8 (head_dim 24).
    return tl.multiple_of(o_base + head.to(tl.int64) * stride_n, VECTOR)


@triton.jit
def member_offset(member_h, member_w, step_h, step_w, VECTOR: tl.constexpr):
    o_rows = tl.multiple_of(member_h.to(tl.int64) * step_h, VECTOR)
    o_columns = tl.multiple_of(member_w.to(tl.int64) * step_w, VECTOR)
    return o_rows + o_columns

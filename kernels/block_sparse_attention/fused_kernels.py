"""Triton kernels of attention by a plan: a program owns some queries of one tile, or some keys of one block.

Keys are counted by their place in a tile's list: place p is key p % KEY_TILE of the block that entry p // KEY_TILE
names. Without an index the place is the key.

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
    product,
    softmax_step,
    store_rows,
)

_ANY = ["heads", "queries", "keys", "tiles", "query_tile", "entries", "blocks"]


@triton.jit
def locate(heads, tiles, parts):
    """Image, head, tile (or block of keys), and part of it, of a program; parts vary fastest."""
    program = tl.program_id(0)
    head = program // parts // tiles
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), program // parts % tiles, program % parts


@triton.jit
def listed(p_index, o_list, entries, o_place, end, keys, KEY_TILE: tl.constexpr, LISTED: tl.constexpr):
    """The keys at some places of a list, and whether they are real."""
    b_real = o_place < end
    if LISTED:
        b_block = tl.load(p_index + o_list * entries + o_place // KEY_TILE, mask=b_real, other=-1)
        b_key = b_block * KEY_TILE + o_place % KEY_TILE
        return b_key, b_real & (b_block >= 0) & (b_key < keys)
    return o_place, b_real


@triton.jit
def rows(p_base, batch, head, o_rows, b_real, stride_b, stride_h, stride_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load vectors of one head."""
    p_base += batch * stride_b + head * stride_h
    return load_rows(p_base, o_rows.to(tl.int64) * stride_n, b_real, WIDTH, BLOCK)


@triton.jit
def scores(b_own, b_other, scale, b_bias, b_real, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """(own, other): scaled products with a bias, -inf where a pair is not real; bias and real broadcast."""
    b_zero = tl.zeros([b_own.shape[0], b_other.shape[0]], tl.float32)
    b_score = product(b_own, tl.trans(b_other), b_zero, PRECISION, INTERPRETED) * scale + b_bias
    return tl.where(b_real, b_score, float("-inf"))


@triton.jit
def biases(p_bias, batch, head, o_key, b_real, stride_b, stride_h, BIASED: tl.constexpr):
    """The biases of some keys, in float32."""
    if BIASED:
        p_bias += batch * stride_b + head * stride_h
        return tl.load(p_bias + o_key, mask=b_real, other=0.0).to(tl.float32)
    return tl.zeros(o_key.shape, tl.float32)


@triton.jit
def offsets(batch, head, heads, o_rows, count, WIDTH: tl.constexpr):
    """Offsets of vectors in a contiguous (B, heads, count, WIDTH)."""
    return ((batch * heads + head) * count + o_rows) * WIDTH


@triton.jit(do_not_specialize=_ANY)
def forward(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_index,
    p_length,
    p_out,
    p_lse,
    scale,
    heads,
    queries,
    keys,
    tiles,
    query_tile,
    entries,
    parts,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    stride_lb,
    stride_lh,
    stride_lt,
    KEY_TILE: tl.constexpr,
    LISTED: tl.constexpr,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N queries of a tile against BLOCK_L keys of its list at a time."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    batch, head, tile, part = locate(heads, tiles, parts)
    o_in = part * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tile * query_tile + o_in
    b_own = (o_in < query_tile) & (o_n < queries)
    b_query = rows(p_query, batch, head, o_n, b_own, stride_qb, stride_qh, stride_qn, HEAD_DIM, BLOCK_D)
    o_list = batch * stride_lb + head * stride_lh + tile * stride_lt
    end = keys
    if LISTED:
        end = tl.load(p_length + o_list) * KEY_TILE
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, end, BLOCK_L):
        o_place = first + tl.arange(0, BLOCK_L)
        o_l, b_real = listed(p_index, o_list, entries, o_place, end, keys, KEY_TILE, LISTED)
        b_key = rows(p_key, batch, head, o_l, b_real, stride_kb, stride_kh, stride_kn, HEAD_DIM, BLOCK_D)
        b_value = rows(p_value, batch, head, o_l, b_real, stride_vb, stride_vh, stride_vn, VALUE_DIM, BLOCK_V)
        b_bias = biases(p_bias, batch, head, o_l, b_real, stride_bb, stride_bh, BIASED)
        b_score = scores(b_query, b_key, scale, b_bias[None, :], b_real[None, :], PRECISION, INTERPRETED)
        b_weight, b_decay, b_max, b_sum = softmax_step(b_score, b_max, b_sum, EXACT)
        b_out = product(b_weight.to(b_value.dtype), b_value, b_out * b_decay[:, None], PRECISION, INTERPRETED)
    b_empty = b_sum == 0
    b_sum = tl.where(b_empty, 1.0, b_sum)
    o_row = offsets(batch, head, heads, o_n, queries, 1)
    store_rows(p_out, o_row * VALUE_DIM, b_out / b_sum[:, None], b_own, VALUE_DIM, BLOCK_V)
    b_lse = tl.where(b_empty, float("-inf"), b_max + tl.log2(b_sum) / LOG2_E)
    tl.store(p_lse + o_row, b_lse, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def backward_queries(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_index,
    p_length,
    p_out,
    p_lse,
    p_grad,
    p_grad_lse,
    p_delta,
    p_grad_query,
    scale,
    heads,
    queries,
    keys,
    tiles,
    query_tile,
    entries,
    parts,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    stride_lb,
    stride_lh,
    stride_lt,
    KEY_TILE: tl.constexpr,
    LISTED: tl.constexpr,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradient of BLOCK_N queries, and each row's `delta` for `backward_keys`: dp/ds = p (dp - delta)."""
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    batch, head, tile, part = locate(heads, tiles, parts)
    o_in = part * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = tile * query_tile + o_in
    b_own = (o_in < query_tile) & (o_n < queries)
    b_query = rows(p_query, batch, head, o_n, b_own, stride_qb, stride_qh, stride_qn, HEAD_DIM, BLOCK_D)
    o_row = offsets(batch, head, heads, o_n, queries, 1)
    b_grad = load_rows(p_grad, o_row * VALUE_DIM, b_own, VALUE_DIM, BLOCK_V)
    b_out = load_rows(p_out, o_row * VALUE_DIM, b_own, VALUE_DIM, BLOCK_V)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    b_delta -= tl.load(p_grad_lse + o_row, mask=b_own, other=0.0)
    tl.store(p_delta + o_row, b_delta, mask=b_own)
    b_lse = tl.load(p_lse + o_row, mask=b_own, other=float("inf"))
    o_list = batch * stride_lb + head * stride_lh + tile * stride_lt
    end = keys
    if LISTED:
        end = tl.load(p_length + o_list) * KEY_TILE
    b_grad_query = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, end, BLOCK_L):
        o_place = first + tl.arange(0, BLOCK_L)
        o_l, b_real = listed(p_index, o_list, entries, o_place, end, keys, KEY_TILE, LISTED)
        b_key = rows(p_key, batch, head, o_l, b_real, stride_kb, stride_kh, stride_kn, HEAD_DIM, BLOCK_D)
        b_value = rows(p_value, batch, head, o_l, b_real, stride_vb, stride_vh, stride_vn, VALUE_DIM, BLOCK_V)
        b_bias = biases(p_bias, batch, head, o_l, b_real, stride_bb, stride_bh, BIASED)
        b_score = scores(b_query, b_key, scale, b_bias[None, :], b_real[None, :], PRECISION, INTERPRETED)
        b_weight = exponential(b_score, b_lse[:, None], EXACT)
        b_zero = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        b_pair = b_weight * (product(b_grad, tl.trans(b_value), b_zero, PRECISION, INTERPRETED) - b_delta[:, None])
        b_grad_query = product(b_pair.to(b_key.dtype), b_key, b_grad_query, PRECISION, INTERPRETED)
    store_rows(p_grad_query, o_row * HEAD_DIM, b_grad_query * scale, b_own, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_ANY)
def backward_keys(
    p_query,
    p_key,
    p_value,
    p_bias,
    p_tile,
    p_first,
    p_lse,
    p_grad,
    p_delta,
    p_grad_key,
    p_grad_value,
    p_grad_bias,
    scale,
    heads,
    queries,
    keys,
    blocks,
    query_tile,
    parts,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    KEY_TILE: tl.constexpr,
    LISTED: tl.constexpr,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradients of BLOCK_L keys of a block, their values and biases, from the tiles that list the block.

    `p_tile` holds these tiles, block after block, and `p_first` where each block's begin: the transposed plan.
    """
    EXACT: tl.constexpr = p_query.dtype.element_ty == tl.float32
    batch, head, block, part = locate(heads, blocks, parts)
    o_l = part * BLOCK_L + tl.arange(0, BLOCK_L)
    b_own = o_l < keys
    begin, end = 0, (queries + BLOCK_N - 1) // BLOCK_N
    steps = 1
    if LISTED:
        b_own = o_l < KEY_TILE
        o_l += block * KEY_TILE
        b_own &= o_l < keys
        steps = (query_tile + BLOCK_N - 1) // BLOCK_N
        p_first += (batch * heads + head) * blocks + block
        begin, end = tl.load(p_first) * steps, tl.load(p_first + 1) * steps
    b_key = rows(p_key, batch, head, o_l, b_own, stride_kb, stride_kh, stride_kn, HEAD_DIM, BLOCK_D)
    b_value = rows(p_value, batch, head, o_l, b_own, stride_vb, stride_vh, stride_vn, VALUE_DIM, BLOCK_V)
    b_bias = biases(p_bias, batch, head, o_l, b_own, stride_bb, stride_bh, BIASED)
    b_grad_key = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_L, BLOCK_V], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_L], tl.float32)
    for step in range(begin, end):
        o_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        b_real = o_n < queries
        if LISTED:
            o_in = step % steps * BLOCK_N + tl.arange(0, BLOCK_N)
            o_n = tl.load(p_tile + step // steps) * query_tile + o_in
            b_real = (o_in < query_tile) & (o_n < queries)
        b_query = rows(p_query, batch, head, o_n, b_real, stride_qb, stride_qh, stride_qn, HEAD_DIM, BLOCK_D)
        o_row = offsets(batch, head, heads, o_n, queries, 1)
        b_grad = load_rows(p_grad, o_row * VALUE_DIM, b_real, VALUE_DIM, BLOCK_V)
        b_delta = tl.load(p_delta + o_row, mask=b_real, other=0.0)
        b_lse = tl.load(p_lse + o_row, mask=b_real, other=float("inf"))
        # Keys are the first factor: in float32 a product keeps its whole second factor in registers over the loop.
        b_score = scores(b_key, b_query, scale, b_bias[:, None], b_own[:, None], PRECISION, INTERPRETED)
        b_weight = exponential(b_score, b_lse[None, :], EXACT)
        b_grad_value = product(b_weight.to(b_grad.dtype), b_grad, b_grad_value, PRECISION, INTERPRETED)
        b_zero = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
        b_pair = b_weight * (product(b_value, tl.trans(b_grad), b_zero, PRECISION, INTERPRETED) - b_delta[None, :])
        b_grad_key = product(b_pair.to(b_query.dtype), b_query, b_grad_key, PRECISION, INTERPRETED)
        b_grad_bias += tl.sum(b_pair, 1)
    o_out = offsets(batch, head, heads, o_l, keys, 1)
    store_rows(p_grad_key, o_out * HEAD_DIM, b_grad_key * scale, b_own, HEAD_DIM, BLOCK_D)
    store_rows(p_grad_value, o_out * VALUE_DIM, b_grad_value, b_own, VALUE_DIM, BLOCK_V)
    if BIASED:
        tl.store(p_grad_bias + o_out, b_grad_bias, mask=b_own)

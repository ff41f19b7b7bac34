"""Triton kernels of strip attention: scores are products of two numbers, so they need no matrix product.

A row's exponents are query * (key - best), where `best` is the key with the largest product: the largest key, or the
smallest key for a negative query. Exponents are at most 0 from the start, so there is no running maximum. Subtracting
keys before multiplying rounds less than subtracting products.

Source: FlashAttention-2, arXiv 2307.08691, for blocks of queries and for weights recomputed in the backward pass.
Names: pointers `p_`, blocks `b_`, offsets `o_`; N counts queries, L keys. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import LOG2_E, load_rows, product, store_rows

# Not specialized: Triton does not recompile a kernel if one of these sizes or strides is 1 or a multiple of 16. Lengths
# change from call to call, and queries and keys are read one number at a time.
_ANY = ["queries", "keys", "heads", "blocks", "images", "splits", "rows"]
_ANY += [f"stride_{name}" for name in ("qb", "qn", "qh", "kb", "kl", "kh")]


@triton.jit
def locate(program, blocks, heads):
    """Image, block and head of a program. Heads vary fastest, because the heads of a row share cache lines."""
    return program // heads // blocks, program // heads % blocks, program % heads


@triton.jit
def best_key(b_query, low, high):
    """The key that has the largest product with a query."""
    return tl.where(b_query >= 0, high, low)


@triton.jit
def weights(b_query, b_key, b_best, b_real):
    """exp(query * key - the row's maximum), zero where a pair is not real; the arguments broadcast."""
    return tl.where(b_real, tl.exp2((b_query * LOG2_E) * (b_key - b_best)), 0.0)


@triton.jit
def extrema(p_low, p_high, batch, head, heads):
    """The smallest and the largest key of one image and head."""
    o_head = batch.to(tl.int64) * heads + head
    return tl.load(p_low + o_head).to(tl.float32), tl.load(p_high + o_head).to(tl.float32)


@triton.jit
def numbers(p_base, batch, head, o_rows, b_real, stride_b, stride_n, stride_h):
    """Load queries or keys of one image and head in float32, zero where a row is not real."""
    p_base += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.load(p_base + o_rows.to(tl.int64) * stride_n, mask=b_real, other=0.0).to(tl.float32)


@triton.jit
def vector_offsets(batch, head, heads, o_rows, rows, HEAD_DIM: tl.constexpr):
    """Offsets of vectors in a contiguous (B, rows, heads, D)."""
    return ((batch.to(tl.int64) * rows + o_rows) * heads + head) * HEAD_DIM


@triton.jit
def row_offsets(batch, head, heads, o_rows, rows):
    """Offsets of numbers in a contiguous (B, heads, rows)."""
    return (batch.to(tl.int64) * heads + head) * rows + o_rows


@triton.jit(do_not_specialize=_ANY)
def forward(
    p_query,
    p_key,
    p_value,
    p_low,
    p_high,
    p_out,
    p_sum,
    queries,
    keys,
    heads,
    blocks,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """BLOCK_N queries of one image and head against BLOCK_L keys at a time."""
    batch, block, head = locate(tl.program_id(0), blocks, heads)
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b_own = o_n < queries
    low, high = extrema(p_low, p_high, batch, head, heads)
    b_query = numbers(p_query, batch, head, o_n, b_own, stride_qb, stride_qn, stride_qh)
    b_best = best_key(b_query, low, high)
    p_value += batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        b_real = o_l < keys
        b_key = numbers(p_key, batch, head, o_l, b_real, stride_kb, stride_kl, stride_kh)
        b_value = load_rows(p_value, o_l.to(tl.int64) * stride_vl, b_real, HEAD_DIM, BLOCK_D)
        b_weight = weights(b_query[:, None], b_key[None, :], b_best[:, None], b_real[None, :])
        b_sum += tl.sum(b_weight, 1)
        b_out = product(b_weight.to(b_value.dtype), b_value, b_out, PRECISION, INTERPRETED)
    o_out = vector_offsets(batch, head, heads, o_n, queries, HEAD_DIM)
    store_rows(p_out, o_out, b_out / b_sum[:, None], b_own, HEAD_DIM, BLOCK_D)
    tl.store(p_sum + row_offsets(batch, head, heads, o_n, queries), b_sum, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def backward_queries(
    p_query,
    p_key,
    p_value,
    p_low,
    p_high,
    p_sum,
    p_grad,
    p_delta,
    p_grad_query,
    queries,
    keys,
    heads,
    blocks,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Gradient of BLOCK_N queries of one image and head, and each query's delta = <grad, out> for `backward_keys`.

    A query's gradient is a covariance under its weights: of the keys, and of the products of the values with `grad`.
    Both means are summed here, in float32; if they were computed from the output, they would carry its rounding.
    """
    batch, block, head = locate(tl.program_id(0), blocks, heads)
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    b_own = o_n < queries
    low, high = extrema(p_low, p_high, batch, head, heads)
    b_query = numbers(p_query, batch, head, o_n, b_own, stride_qb, stride_qn, stride_qh)
    b_best = best_key(b_query, low, high)
    o_out = vector_offsets(batch, head, heads, o_n, queries, HEAD_DIM)
    o_row = row_offsets(batch, head, heads, o_n, queries)
    b_grad = load_rows(p_grad, o_out, b_own, HEAD_DIM, BLOCK_D)
    b_share = 1 / tl.load(p_sum + o_row, mask=b_own, other=1.0)
    p_value += batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    b_delta = tl.zeros([BLOCK_N], tl.float32)
    b_mean = tl.zeros([BLOCK_N], tl.float32)
    b_both = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, keys, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        b_real = o_l < keys
        b_key = numbers(p_key, batch, head, o_l, b_real, stride_kb, stride_kl, stride_kh)
        b_value = load_rows(p_value, o_l.to(tl.int64) * stride_vl, b_real, HEAD_DIM, BLOCK_D)
        b_weight = weights(b_query[:, None], b_key[None, :], b_best[:, None], b_real[None, :])
        b_zero = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        b_grad_weight = product(b_grad, tl.trans(b_value), b_zero, PRECISION, INTERPRETED)
        b_apart = b_weight * (b_key[None, :] - b_best[:, None])
        b_delta += tl.sum(b_weight * b_grad_weight, 1)
        b_mean += tl.sum(b_apart, 1)
        b_both += tl.sum(b_apart * b_grad_weight, 1)
    b_delta *= b_share
    tl.store(p_delta + o_row, b_delta, mask=b_own)
    b_grad_query = (b_both - b_mean * b_delta) * b_share
    o_query = vector_offsets(batch, head, heads, o_n, queries, 1)
    tl.store(p_grad_query + o_query, b_grad_query.to(p_grad_query.dtype.element_ty), mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def backward_keys(
    p_query,
    p_key,
    p_value,
    p_low,
    p_high,
    p_sum,
    p_grad,
    p_delta,
    p_grad_key,
    p_grad_value,
    queries,
    keys,
    heads,
    blocks,
    images,
    splits,
    rows,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Gradients of BLOCK_L keys and values of one image and head, summed over a split of `rows` queries.

    Weights are keys by queries here. Results are (splits, B, L, heads) and (splits, B, L, heads, D).
    """
    item, block, head = locate(tl.program_id(0), blocks, heads)
    batch = item // splits
    split = item % splits
    o_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    b_own = o_l < keys
    low, high = extrema(p_low, p_high, batch, head, heads)
    b_key = numbers(p_key, batch, head, o_l, b_own, stride_kb, stride_kl, stride_kh)
    p_value += batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    b_value = load_rows(p_value, o_l.to(tl.int64) * stride_vl, b_own, HEAD_DIM, BLOCK_D)
    b_grad_key = tl.zeros([BLOCK_L], tl.float32)
    b_grad_value = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(split * rows, tl.minimum(queries, (split + 1) * rows), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        b_real = o_n < queries
        b_query = numbers(p_query, batch, head, o_n, b_real, stride_qb, stride_qn, stride_qh)
        o_row = row_offsets(batch, head, heads, o_n, queries)
        b_grad = load_rows(
            p_grad, vector_offsets(batch, head, heads, o_n, queries, HEAD_DIM), b_real, HEAD_DIM, BLOCK_D
        )
        b_delta = tl.load(p_delta + o_row, mask=b_real, other=0.0)
        b_share = 1 / tl.load(p_sum + o_row, mask=b_real, other=1.0)
        b_best = best_key(b_query, low, high)
        b_weight = weights(b_query[None, :], b_key[:, None], b_best[None, :], b_real[None, :]) * b_share[None, :]
        b_grad_value = product(b_weight.to(b_grad.dtype), b_grad, b_grad_value, PRECISION, INTERPRETED)
        b_zero = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
        b_grad_weight = product(b_value, tl.trans(b_grad), b_zero, PRECISION, INTERPRETED)
        b_grad_key += tl.sum(b_weight * (b_grad_weight - b_delta[None, :]) * b_query[None, :], 1)
    o_key = vector_offsets(split * images + batch, head, heads, o_l, keys, 1)
    tl.store(p_grad_key + o_key, b_grad_key.to(p_grad_key.dtype.element_ty), mask=b_own)
    store_rows(p_grad_value, o_key * HEAD_DIM, b_grad_value, b_own, HEAD_DIM, BLOCK_D)

"""Triton kernels of the bins: the mean of each bin, and the gradient of the map from the gradients of the means.

Bin t of `length` positions is [floor(t length / TAPS), ceil((t + 1) length / TAPS)); neighbours may share a position.
Names: pointers `p_`, blocks `b_`, offsets `o_`. Maps are (B, L, C), contiguous. Addresses are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def bin_begin(number, length, TAPS: tl.constexpr):
    return number * length // TAPS


@triton.jit
def bin_end(number, length, TAPS: tl.constexpr):
    return ((number + 1) * length + TAPS - 1) // TAPS


@triton.jit(do_not_specialize=["length", "splits"])
def pool(
    p_x,
    p_partial,
    length,
    splits,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one of `splits` parts of a bin's mean, for one image and block of channels: (B, TAPS, splits, C)."""
    program = tl.program_id(0)
    item = program // splits
    number = item % TAPS
    begin = bin_begin(number, length, TAPS)
    end = bin_end(number, length, TAPS)
    count = end - begin
    part = tl.cdiv(count, splits)
    first = begin + (program % splits) * part
    last = tl.minimum(first + part, end)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_x += (item // TAPS).to(tl.int64) * length * CHANNELS
    b_sum = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for position in range(first, last, BLOCK_L):
        o_l = position + tl.arange(0, BLOCK_L)
        b_mask = (o_l < last)[:, None] & (o_c < CHANNELS)[None, :]
        b_sum += tl.load(p_x + o_l.to(tl.int64)[:, None] * CHANNELS + o_c[None, :], mask=b_mask, other=0.0)
    b_mean = tl.sum(b_sum, 0) / count
    tl.store(p_partial + program.to(tl.int64) * CHANNELS + o_c, b_mean, mask=o_c < CHANNELS)


@triton.jit(do_not_specialize=["length", "blocks"])
def spread(
    p_grad_pooled,
    p_grad_x,
    length,
    blocks,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Spread the gradient of each mean over its bin, at BLOCK_L of the `blocks` * BLOCK_L positions of one image."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    o_l = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_grad_pooled += image * TAPS * CHANNELS
    b_grad = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for number in tl.static_range(TAPS):
        begin = bin_begin(number, length, TAPS)
        end = bin_end(number, length, TAPS)
        b_mean = tl.load(p_grad_pooled + number * CHANNELS + o_c, mask=o_c < CHANNELS, other=0.0) / (end - begin)
        b_grad += tl.where(((o_l >= begin) & (o_l < end))[:, None], b_mean[None, :], 0.0)
    o_x = (image * length + o_l)[:, None] * CHANNELS + o_c[None, :]
    b_mask = (o_l < length)[:, None] & (o_c < CHANNELS)[None, :]
    tl.store(p_grad_x + o_x, b_grad.to(p_grad_x.dtype.element_ty), mask=b_mask)

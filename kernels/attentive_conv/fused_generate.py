"""Triton kernels from the projected bins to the convolution's kernels, and back; all (B, TAPS, C), in float32.

Names: pointers `p_`, blocks `b_`, offsets `o_`.
"""

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_OF_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def normal_below(b_x):
    """The cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + tl.erf(b_x * ROOT_HALF))


@triton.jit
def load_logistic(p_logit, o_c, CHANNELS: tl.constexpr):
    b_logit = tl.load(p_logit + o_c, mask=o_c < CHANNELS, other=0.0).to(tl.float32)
    return tl.sigmoid(b_logit)


@triton.jit
def raw_kernels(p_projected, p_mixing, p_mixing_bias, o_t, o_c, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Kernels before inhibition, (len(o_t), len(o_c)); zero past TAPS."""
    b_bias = tl.load(p_mixing_bias + o_t, mask=o_t < TAPS, other=0.0).to(tl.float32)
    b_raw = b_bias[:, None] + tl.zeros([1, o_c.shape[0]], tl.float32)
    for tap in tl.static_range(TAPS):
        b_projected = tl.load(p_projected + tap * CHANNELS + o_c, mask=o_c < CHANNELS, other=0.0)
        b_active = b_projected * normal_below(b_projected)
        b_column = tl.load(p_mixing + o_t * TAPS + tap, mask=o_t < TAPS, other=0.0).to(tl.float32)
        b_raw += b_column[:, None] * b_active[None, :]
    return b_raw


@triton.jit
def generate(
    p_projected,
    p_mixing,
    p_mixing_bias,
    p_inhibition,
    p_kernels,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The kernels of one image and block of channels."""
    o_image = tl.program_id(0).to(tl.int64) * TAPS * CHANNELS
    o_t = tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_raw = raw_kernels(p_projected + o_image, p_mixing, p_mixing_bias, o_t, o_c, CHANNELS, TAPS)
    b_lost = load_logistic(p_inhibition, o_c, CHANNELS) * tl.sum(b_raw, 0) / TAPS
    b_mask = (o_t < TAPS)[:, None] & (o_c < CHANNELS)[None, :]
    tl.store(p_kernels + o_image + o_t[:, None] * CHANNELS + o_c[None, :], b_raw - b_lost[None, :], mask=b_mask)


@triton.jit
def generate_backward(
    p_projected,
    p_mixing,
    p_mixing_bias,
    p_inhibition,
    p_grad_kernels,
    p_grad_projected,
    p_partial_mixing,
    p_partial_inhibition,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of one image and block of channels. They must be summed over images, the mixing's over blocks, too.

    Partial sums: mixing (B * blocks, TAPS, TAPS + 1) with the bias in the last column; inhibition (B, C).
    """
    image = tl.program_id(0).to(tl.int64)
    o_image = image * TAPS * CHANNELS
    o_t = tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_mask = (o_t < TAPS)[:, None] & (o_c < CHANNELS)[None, :]
    b_grad = tl.load(p_grad_kernels + o_image + o_t[:, None] * CHANNELS + o_c[None, :], mask=b_mask, other=0.0)
    b_share = load_logistic(p_inhibition, o_c, CHANNELS)
    b_total = tl.sum(b_grad, 0)
    b_raw = raw_kernels(p_projected + o_image, p_mixing, p_mixing_bias, o_t, o_c, CHANNELS, TAPS)
    b_slope = b_share * (1.0 - b_share)
    b_inhibition = -b_slope * (tl.sum(b_raw, 0) / TAPS) * b_total
    tl.store(p_partial_inhibition + image * CHANNELS + o_c, b_inhibition, mask=o_c < CHANNELS)
    b_grad = tl.where(b_mask, b_grad - (b_share * b_total / TAPS)[None, :], 0.0)
    program = image * tl.num_programs(1) + tl.program_id(1)
    p_partial_mixing += (program * TAPS + o_t) * (TAPS + 1)
    for tap in tl.static_range(TAPS):
        o_row = o_image + tap * CHANNELS + o_c
        b_projected = tl.load(p_projected + o_row, mask=o_c < CHANNELS, other=0.0)
        b_below = normal_below(b_projected)
        b_density = tl.exp(-0.5 * b_projected * b_projected) / ROOT_OF_TWO_PI
        b_column = tl.load(p_mixing + o_t * TAPS + tap, mask=o_t < TAPS, other=0.0).to(tl.float32)
        b_active = tl.sum(b_column[:, None] * b_grad, 0)
        tl.store(p_grad_projected + o_row, b_active * (b_below + b_projected * b_density), mask=o_c < CHANNELS)
        b_row = tl.sum(b_grad * (b_projected * b_below)[None, :], 1)
        tl.store(p_partial_mixing + tap, b_row, mask=o_t < TAPS)
    tl.store(p_partial_mixing + TAPS, tl.sum(b_grad, 1), mask=o_t < TAPS)

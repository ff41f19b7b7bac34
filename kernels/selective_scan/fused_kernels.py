"""Triton kernels of the selective scan, with separate programs for chunks of steps.

`forward` steps along time with the states of its channels in registers. The other kernels work on a whole chunk at
once, steps by channels, one state after another. Decays are exp2 of products that are at most 0, and are only
multiplied, or added up in the exponent, so nothing overflows. An order is a map from step to pixel, computed here.

Sources: Mamba, arXiv 2312.00752, section 3.3 (states recomputed in the backward pass); Blelloch, "Prefix sums and their
applications", 1990, for the pairs of `combine`.
Names: pointers `p_`, blocks `b_`, offsets `o_`; B, L, K, D, N as in reference.py. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import LOG2_E

# Not specialized: Triton does not recompile a kernel if one of these sizes is 1 or a multiple of 16.
_ANY = ["length", "width", "scans", "channels", "chunks", "blocks", "images"]
# ln 2 as a sum of two numbers; the first has 15 bits.
_LN2_HIGH, _LN2_LOW = tl.constexpr(0.693145751953125), tl.constexpr(1.4286068203094173e-06)
# Neighbouring channels of a thread of `backward`. Fewer than a vector load could take leave more lanes to channels and
# fewer to steps; a scan across the lanes of steps costs shuffles.
_VECTOR = tl.constexpr(2)
# Chunks that `carry` scans at once.
_CHUNKS = tl.constexpr(16)


@triton.jit
def combine(decay_left, x_left, decay_right, x_right):
    """Combine two consecutive stretches of h_t = decay_t h_(t-1) + x_t into one."""
    return decay_left * decay_right, decay_right * x_left + x_right


@triton.jit
def order_of(scan, ORDERS: tl.constexpr, SCANS: tl.constexpr):
    """The code of a scan's order: ORDERS has two bits for each scan; SCANS is 1 if all orders are equal."""
    code = scan * 0 + (ORDERS & 3)
    for k in tl.static_range(1, SCANS):
        code = tl.where(scan == k, (ORDERS >> (2 * k)) & 3, code)
    return code


@triton.jit
def pixel_of(step, code, length, width):
    """The pixel that a step reads; see orders.py."""
    step = tl.where((code & 2) != 0, length - 1 - step, step)
    height = length // width
    return tl.where((code & 1) != 0, step % height * width + step // height, step)


@triton.jit
def exponential(b_x):
    """exp(x) to a unit in the last place, for x <= 0, by x = k ln 2 + rest; rounding x log2(e) would err by more."""
    b_whole = tl.floor(b_x * LOG2_E + 0.5)
    b_rest = b_x - b_whole * _LN2_HIGH - b_whole * _LN2_LOW  # the first product is exact
    return tl.exp2(b_whole) * tl.exp2(b_rest * LOG2_E)


@triton.jit
def step_size(b_x, HAS_SOFTPLUS: tl.constexpr):
    """softplus(x), linear above 20: max(x, 0) + log(1 + e), e = exp(-|x|), the logarithm by a series in e / (2 + e).

    Adding 1 to a small e would lose digits of e.
    """
    if not HAS_SOFTPLUS:
        return b_x
    b_size = tl.abs(b_x)
    b_exp = exponential(-tl.where(b_size > 104, 104.0, b_size))
    b_ratio = b_exp / (2 + b_exp)  # at most 1/3
    b_square = b_ratio * b_ratio
    b_sum = 1 / 15 + b_square * (1 / 17)
    b_sum = 1 / 13 + b_square * b_sum
    b_sum = 1 / 11 + b_square * b_sum
    b_sum = 1 / 9 + b_square * b_sum
    b_sum = 1 / 7 + b_square * b_sum
    b_sum = 1 / 5 + b_square * b_sum
    b_sum = 1 / 3 + b_square * b_sum
    b_log = 2 * b_ratio * (1 + b_square * b_sum)
    return tl.where(b_x > 20, b_x, (b_x + b_size) * 0.5 + b_log)  # a NaN stays a NaN; a maximum would hide it


@triton.jit
def step_size_slope(b_x, HAS_SOFTPLUS: tl.constexpr):
    """The derivative of `step_size`: 1 / (1 + exp(-x)), 1 above 20."""
    if not HAS_SOFTPLUS:
        return b_x * 0 + 1
    return tl.where(b_x > 20, 1.0, sigmoid(b_x))


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)); 0 where exp(-x) overflows."""
    return 1 / (1 + tl.exp2(-b_x * LOG2_E))


@triton.jit
def numbers(p_base, o_x, b_real):
    """Load numbers in float32, zero where not real."""
    return tl.load(p_base + o_x, mask=b_real, other=0.0).to(tl.float32)


@triton.jit
def steps(p_delta, o_delta, b_real, b_bias, HAS_SOFTPLUS: tl.constexpr):
    """Load step sizes, zero where not real."""
    return tl.where(b_real, step_size(numbers(p_delta, o_delta, b_real) + b_bias, HAS_SOFTPLUS), 0.0)


@triton.jit
def at(image, scan, stride_b, stride_k):
    """Offset of one scan of one image."""
    return image.to(tl.int64) * stride_b + scan.to(tl.int64) * stride_k


@triton.jit
def tile(o_rows, o_d, stride_l, stride_d):
    """Offsets of a tile, steps by channels."""
    return o_rows.to(tl.int64)[:, None] * stride_l + o_d.to(tl.int64)[None, :] * stride_d


@triton.jit
def locate(program, blocks, scans, chunks):
    """Image, chunk, scan and block of a program; programs that read the same pixels are neighbours."""
    block, program = program % blocks, program // blocks
    scan, program = program % scans, program // scans
    return program // chunks, program % chunks, scan, block


@triton.jit(do_not_specialize=_ANY)
def forward(
    p_u,
    p_delta,
    p_A,
    p_B,
    p_C,
    p_D,
    p_z,
    p_bias,
    p_out,
    p_states,
    length,
    width,
    scans,
    channels,
    chunks,
    blocks,
    stride_ub,
    stride_ul,
    stride_uk,
    stride_ud,
    stride_db,
    stride_dl,
    stride_dk,
    stride_dd,
    stride_Ak,
    stride_Ad,
    stride_An,
    stride_Bb,
    stride_Bl,
    stride_Bk,
    stride_Bn,
    stride_Cb,
    stride_Cl,
    stride_Ck,
    stride_Cn,
    stride_Dk,
    stride_Dd,
    stride_zb,
    stride_zl,
    stride_zk,
    stride_zd,
    stride_bk,
    stride_bd,
    ORDERS: tl.constexpr,
    SCANS: tl.constexpr,
    N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Output of one scan of one image for BLOCK_D channels, step by step with BLOCK_N x BLOCK_D states in registers.

    With SPLIT, the steps of one chunk, from its given first state. Otherwise all steps; the state before each chunk is
    kept.
    """
    if SPLIT:
        image, chunk, scan, block = locate(tl.program_id(0), blocks, scans, chunks)
        first = chunk * CHUNK
        last = tl.minimum(first + CHUNK, length)
    else:
        image, chunk, scan, block = locate(tl.program_id(0), blocks, scans, 1)
        first = 0
        last = length
    o_n = tl.arange(0, BLOCK_N)
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    b_n = o_n < N
    b_d = o_d < channels
    b_both = b_n[:, None] & b_d[None, :]
    p_u += at(image, scan, stride_ub, stride_uk) + o_d.to(tl.int64) * stride_ud
    p_delta += at(image, scan, stride_db, stride_dk) + o_d.to(tl.int64) * stride_dd
    p_B += at(image, scan, stride_Bb, stride_Bk) + o_n.to(tl.int64) * stride_Bn
    p_C += at(image, scan, stride_Cb, stride_Ck) + o_n.to(tl.int64) * stride_Cn
    p_z += at(image, scan, stride_zb, stride_zk) + o_d.to(tl.int64) * stride_zd
    p_out += at(image, scan, length.to(tl.int64) * scans * channels, channels) + o_d
    p_A += scan.to(tl.int64) * stride_Ak
    b_A = numbers(p_A, o_n[:, None] * stride_An + o_d[None, :] * stride_Ad, b_both) * LOG2_E
    b_skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        b_skip = numbers(p_D + scan.to(tl.int64) * stride_Dk, o_d * stride_Dd, b_d)
    b_bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        b_bias = numbers(p_bias + scan.to(tl.int64) * stride_bk, o_d * stride_bd, b_d)
    p_states += ((image.to(tl.int64) * chunks + chunk) * scans + scan) * N * channels
    p_states += o_n[:, None] * channels + o_d[None, :]
    stride_states = scans.to(tl.int64) * N * channels
    stride_out = scans.to(tl.int64) * channels
    b_state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SPLIT:
        b_state = tl.load(p_states, mask=b_both, other=0.0)

    code = order_of(scan, ORDERS, SCANS)
    pixel = pixel_of(first, code, length, width).to(tl.int64)
    stride = tl.where((code & 1) != 0, width, 1)
    stride = tl.where((code & 2) != 0, -stride, stride)
    b_u = numbers(p_u, pixel * stride_ul, b_d)
    b_delta = numbers(p_delta, pixel * stride_dl, b_d)
    b_B = numbers(p_B, pixel * stride_Bl, b_n)
    b_C = numbers(p_C, pixel * stride_Cl, b_n)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    if HAS_Z:
        b_z = numbers(p_z, pixel * stride_zl, b_d)
    for step in range(first, last):
        if not SPLIT:  # noqa: SIM102 (decided at compile time; the next condition at run time)
            if step % CHUNK == 0:
                tl.store(p_states, b_state, mask=b_both)
                p_states += stride_states
        # The next step's numbers are loaded before this step's are used; the last step loads its own numbers again.
        here = pixel
        after = pixel + tl.where(step + 1 < last, stride, 0)
        after = tl.where(after >= length, after - (length - 1), after)
        pixel = tl.where(after < 0, after + (length - 1), after)
        b_u_next = numbers(p_u, pixel * stride_ul, b_d)
        b_delta_next = numbers(p_delta, pixel * stride_dl, b_d)
        b_B_next = numbers(p_B, pixel * stride_Bl, b_n)
        b_C_next = numbers(p_C, pixel * stride_Cl, b_n)
        b_z_next = b_z
        if HAS_Z:
            b_z_next = numbers(p_z, pixel * stride_zl, b_d)

        b_dt = step_size(b_delta + b_bias, HAS_SOFTPLUS)
        b_state = tl.exp2(b_dt[None, :] * b_A) * b_state + (b_dt * b_u)[None, :] * b_B[:, None]
        b_out = tl.sum(b_state * b_C[:, None], 0) + b_skip * b_u
        if HAS_Z:
            b_out *= b_z * sigmoid(b_z)
        tl.store(p_out + here * stride_out, b_out.to(p_out.dtype.element_ty), mask=b_d)
        b_u, b_delta, b_B, b_C, b_z = b_u_next, b_delta_next, b_B_next, b_C_next, b_z_next


@triton.jit(do_not_specialize=_ANY)
def ends(
    p_x,
    p_delta,
    p_A,
    p_B,
    p_z,
    p_bias,
    p_states,
    p_sums,
    length,
    width,
    scans,
    channels,
    chunks,
    blocks,
    stride_xb,
    stride_xl,
    stride_xk,
    stride_xd,
    stride_db,
    stride_dl,
    stride_dk,
    stride_dd,
    stride_Ak,
    stride_Ad,
    stride_An,
    stride_Bb,
    stride_Bl,
    stride_Bk,
    stride_Bn,
    stride_zb,
    stride_zl,
    stride_zk,
    stride_zd,
    stride_bk,
    stride_bd,
    ORDERS: tl.constexpr,
    SCANS: tl.constexpr,
    N: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTPLUS: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What one chunk alone adds to the next chunk's first state, and the sum of its step sizes, which gives its decay.

    With BACKWARD, what the chunk alone adds to the gradient of its first state; x is then the output's gradient, and B
    is C. Both results are stored at the chunk that receives them: (B, chunks, K, N, D) and (B, chunks, K, D).
    """
    image, chunk, scan, block = locate(tl.program_id(0), blocks, scans, chunks - 1)
    into = chunk + 1
    if BACKWARD:
        into = chunk
        chunk += 1
    o_t = chunk * CHUNK + tl.arange(0, CHUNK)
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    b_t = o_t < length
    b_d = o_d < channels
    b_both = b_t[:, None] & b_d[None, :]
    code = order_of(scan, ORDERS, SCANS)
    o_pixel = pixel_of(o_t, code, length, width)
    p_delta += at(image, scan, stride_db, stride_dk)
    b_bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        b_bias = numbers(p_bias + scan.to(tl.int64) * stride_bk, o_d * stride_bd, b_d)
    b_bias = b_bias[None, :]
    b_dt = steps(p_delta, tile(o_pixel, o_d, stride_dl, stride_dd), b_both, b_bias, HAS_SOFTPLUS)
    b_x = numbers(p_x + at(image, scan, stride_xb, stride_xk), tile(o_pixel, o_d, stride_xl, stride_xd), b_both)
    b_sum = tl.sum(b_dt, 0)
    if BACKWARD:
        if HAS_Z:
            p_z += at(image, scan, stride_zb, stride_zk)
            b_z = numbers(p_z, tile(o_pixel, o_d, stride_zl, stride_zd), b_both)
            b_x *= b_z * sigmoid(b_z)
        b_apart = tl.cumsum(b_dt, 0)  # from the chunk's start
    else:
        b_x *= b_dt
        # To the chunk's end, without the step itself. A difference of two sums would lose digits.
        o_after = pixel_of(o_t + 1, code, length, width)
        b_after = (tl.arange(0, CHUNK) < CHUNK - 1)[:, None] & b_d[None, :]
        b_apart = steps(p_delta, tile(o_after, o_d, stride_dl, stride_dd), b_after, b_bias, HAS_SOFTPLUS)
        b_apart = tl.cumsum(b_apart, 0, reverse=True)
    p_A += scan.to(tl.int64) * stride_Ak + o_d * stride_Ad
    p_B += at(image, scan, stride_Bb, stride_Bk) + o_pixel.to(tl.int64) * stride_Bl
    o_kept = (image.to(tl.int64) * chunks + into) * scans + scan
    tl.store(p_sums + o_kept * channels + o_d, b_sum, mask=b_d)
    p_states += o_kept * N * channels + o_d
    for n in range(N):
        b_A = numbers(p_A, n * stride_An, b_d) * LOG2_E
        b_B = numbers(p_B, n * stride_Bn, b_t)
        b_end = tl.sum(tl.exp2(b_apart * b_A[None, :]) * b_x * b_B[:, None], 0)
        tl.store(p_states + n * channels, b_end, mask=b_d)


@triton.jit(do_not_specialize=_ANY)
def carry(
    p_A,
    p_states,
    p_sums,
    scans,
    channels,
    chunks,
    blocks,
    stride_Ak,
    stride_Ad,
    stride_An,
    N: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn the contribution of each chunk alone into the sum over all chunks before it (BACKWARD: behind it).

    One state, _CHUNKS chunks at a time. The very first state is 0.
    """
    block = tl.program_id(0) % blocks
    state = tl.program_id(0) // blocks % N
    scan = tl.program_id(0) // blocks // N % scans
    image = tl.program_id(0) // blocks // N // scans
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    b_d = o_d < channels
    p_A += scan.to(tl.int64) * stride_Ak + state * stride_An
    b_A = numbers(p_A, o_d * stride_Ad, b_d) * LOG2_E
    b_carried = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, chunks, _CHUNKS):
        o_t = first + tl.arange(0, _CHUNKS)
        b_t = o_t < chunks
        b_given = ((o_t > 0) & b_t)[:, None] & b_d[None, :]
        if BACKWARD:
            o_t = chunks - 1 - o_t
        o_kept = ((image.to(tl.int64) * chunks + o_t) * scans + scan)[:, None]
        p_here = p_states + (o_kept * N + state) * channels + o_d[None, :]
        b_x = tl.load(p_here, mask=b_given, other=0.0)
        b_dt = tl.load(p_sums + o_kept * channels + o_d[None, :], mask=b_given, other=0.0)
        b_decay = tl.exp2(b_dt * b_A[None, :])
        b_first = (tl.arange(0, _CHUNKS) == 0)[:, None]
        b_x += tl.where(b_first, b_decay * b_carried[None, :], 0.0)
        _, b_x = tl.associative_scan((b_decay, b_x), 0, combine)
        tl.store(p_here, b_x, mask=b_t[:, None] & b_d[None, :])
        b_last = (tl.arange(0, _CHUNKS) == _CHUNKS - 1)[:, None]
        b_carried = tl.sum(tl.where(b_last, b_x, 0.0), 0)


@triton.jit(do_not_specialize=_ANY)
def backward(
    p_u,
    p_delta,
    p_A,
    p_B,
    p_C,
    p_D,
    p_z,
    p_bias,
    p_grad,
    p_states,
    p_after,
    p_grad_u,
    p_grad_delta,
    p_grad_A,
    p_grad_B,
    p_grad_C,
    p_grad_D,
    p_grad_z,
    p_grad_bias,
    length,
    width,
    scans,
    channels,
    chunks,
    images,
    blocks,
    stride_ub,
    stride_ul,
    stride_uk,
    stride_ud,
    stride_db,
    stride_dl,
    stride_dk,
    stride_dd,
    stride_Ak,
    stride_Ad,
    stride_An,
    stride_Bb,
    stride_Bl,
    stride_Bk,
    stride_Bn,
    stride_Cb,
    stride_Cl,
    stride_Ck,
    stride_Cn,
    stride_Dk,
    stride_Dd,
    stride_zb,
    stride_zl,
    stride_zk,
    stride_zd,
    stride_bk,
    stride_bd,
    stride_gb,
    stride_gl,
    stride_gk,
    stride_gd,
    ORDERS: tl.constexpr,
    SCANS: tl.constexpr,
    N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of one chunk of one scan of one image for BLOCK_D channels, one state after another.

    With a the decays and dy the gradient of y, g_t = a_(t+1) g_(t+1) + C_t dy_t runs from the chunk's end to its start.
    Gradients to which several programs contribute are written as parts of a sum: for B and C (blocks, B, K, N, L), for
    A (B, chunks, K, N, D), for D and the bias (B, chunks, K, D).
    """
    image, chunk, scan, block = locate(tl.program_id(0), blocks, scans, chunks)
    o_t = chunk * CHUNK + tl.arange(0, CHUNK)
    o_d = tl.max_contiguous(block * BLOCK_D + tl.arange(0, BLOCK_D), _VECTOR)
    b_t = o_t < length
    b_d = o_d < channels
    b_both = b_t[:, None] & b_d[None, :]
    b_first = (tl.arange(0, CHUNK) == 0)[:, None]
    b_last = (tl.arange(0, CHUNK) == CHUNK - 1)[:, None]
    code = order_of(scan, ORDERS, SCANS)
    o_pixel = pixel_of(o_t, code, length, width)
    o_before = pixel_of(o_t - 1, code, length, width)
    o_after = pixel_of(o_t + 1, code, length, width)
    b_before = (tl.arange(0, CHUNK) > 0) & (o_t - 1 < length)
    b_before_both = b_before[:, None] & b_d[None, :]
    b_after_both = (o_t + 1 < length)[:, None] & b_d[None, :]
    p_delta += at(image, scan, stride_db, stride_dk)
    p_u += at(image, scan, stride_ub, stride_uk)
    b_bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        b_bias = numbers(p_bias + scan.to(tl.int64) * stride_bk, o_d * stride_bd, b_d)
    b_bias = b_bias[None, :]
    o_delta = tile(o_pixel, o_d, stride_dl, stride_dd)
    b_dt = steps(p_delta, o_delta, b_both, b_bias, HAS_SOFTPLUS)  # steps that are not real have size 0: no change
    b_x = b_dt * numbers(p_u, tile(o_pixel, o_d, stride_ul, stride_ud), b_both)
    b_dt_after = steps(p_delta, tile(o_after, o_d, stride_dl, stride_dd), b_after_both, b_bias, HAS_SOFTPLUS)
    b_x_before = steps(p_delta, tile(o_before, o_d, stride_dl, stride_dd), b_before_both, b_bias, HAS_SOFTPLUS)
    b_x_before *= numbers(p_u, tile(o_before, o_d, stride_ul, stride_ud), b_before_both)
    p_grad += at(image, scan, stride_gb, stride_gk)
    b_dy = numbers(p_grad, tile(o_pixel, o_d, stride_gl, stride_gd), b_both)
    if HAS_Z:
        o_z = at(image, scan, stride_zb, stride_zk) + tile(o_pixel, o_d, stride_zl, stride_zd)
        b_z = numbers(p_z, o_z, b_both)
        b_dy *= b_z * sigmoid(b_z)
    b_y = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_grad_x = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_grad_dt = tl.zeros([CHUNK, BLOCK_D], tl.float32)

    p_A += scan.to(tl.int64) * stride_Ak + o_d * stride_Ad
    p_B += at(image, scan, stride_Bb, stride_Bk)
    p_C += at(image, scan, stride_Cb, stride_Ck)
    o_kept = (image.to(tl.int64) * chunks + chunk) * scans + scan
    o_state = o_kept * N * channels + o_d
    o_pair = ((block * images + image).to(tl.int64) * scans + scan) * N * length
    p_grad_B += o_pair
    p_grad_C += o_pair
    for n in range(N):
        b_A = numbers(p_A, n * stride_An, b_d)[None, :]
        b_B = numbers(p_B, o_pixel.to(tl.int64) * stride_Bl, b_t)[:, None]
        b_B_before = numbers(p_B, o_before.to(tl.int64) * stride_Bl, b_before)[:, None]
        b_C = numbers(p_C, o_pixel.to(tl.int64) * stride_Cl, b_t)[:, None]
        b_start = tl.load(p_states + o_state + n * channels, mask=b_d, other=0.0)[None, :]
        b_end = tl.load(p_after + o_state + n * channels, mask=b_d, other=0.0)[None, :]
        # The part of the previous state that each step keeps. A difference of states would lose digits of a small part.
        b_decay = tl.exp2(b_dt * (b_A * LOG2_E))
        b_given = b_decay * tl.where(b_first, b_start, b_x_before * b_B_before)
        _, b_flow = tl.associative_scan((b_decay, b_given), 0, combine)
        b_state = b_flow + b_x * b_B
        if HAS_Z:
            b_y += b_state * b_C
        tl.store(p_grad_C + o_pixel, tl.sum(b_dy * b_state, 1), mask=b_t)
        b_decay = tl.exp2(b_dt_after * (b_A * LOG2_E))
        b_given = b_dy * b_C + tl.where(b_last, b_end, 0.0)
        _, b_g = tl.associative_scan((b_decay, b_given), 0, combine, reverse=True)
        tl.store(p_grad_B + o_pixel, tl.sum(b_g * b_x, 1), mask=b_t)
        b_grad_x += b_g * b_B
        b_flow *= b_g
        b_grad_dt += b_flow * b_A
        tl.store(p_grad_A + o_state + n * channels, tl.sum(b_flow * b_dt, 0), mask=b_d)
        p_B += stride_Bn
        p_C += stride_Cn
        p_grad_B += length
        p_grad_C += length

    # Tensors that the loop does not need are loaded again, to save registers in the loop.
    o_out = ((image.to(tl.int64) * length + o_pixel) * scans + scan)[:, None] * channels + o_d[None, :]
    o_sum = o_kept * channels + o_d
    b_u = numbers(p_u, tile(o_pixel, o_d, stride_ul, stride_ud), b_both)
    b_skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        b_skip = numbers(p_D + scan.to(tl.int64) * stride_Dk, o_d * stride_Dd, b_d)
        tl.store(p_grad_D + o_sum, tl.sum(b_dy * b_u, 0), mask=b_d)
    if HAS_Z:
        b_grad = numbers(p_grad, tile(o_pixel, o_d, stride_gl, stride_gd), b_both)
        b_z = numbers(p_z, o_z, b_both)
        b_gate = sigmoid(b_z)
        b_grad_z = b_grad * (b_y + b_skip[None, :] * b_u) * b_gate * (1 + b_z * (1 - b_gate))
        tl.store(p_grad_z + o_out, b_grad_z.to(p_grad_z.dtype.element_ty), mask=b_both)
    b_grad_u = b_dt * b_grad_x + b_skip[None, :] * b_dy
    tl.store(p_grad_u + o_out, b_grad_u.to(p_grad_u.dtype.element_ty), mask=b_both)
    b_slope = step_size_slope(numbers(p_delta, o_delta, b_both) + b_bias, HAS_SOFTPLUS)
    b_grad_delta = (b_u * b_grad_x + b_grad_dt) * b_slope
    tl.store(p_grad_delta + o_out, b_grad_delta.to(p_grad_delta.dtype.element_ty), mask=b_both)
    if HAS_BIAS:
        tl.store(p_grad_bias + o_sum, tl.sum(tl.where(b_both, b_grad_delta, 0.0), 0), mask=b_d)

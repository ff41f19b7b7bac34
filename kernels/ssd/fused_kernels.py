"""Triton kernels of the state space dual: a program owns a chunk of steps of one head.

`states` computes what a chunk adds to the state, or to its gradient; `carry` runs over the chunks; `outputs` and
`gradients` work on a chunk between the states that bound it. The decay between two steps is the exponential of a sum
over the steps between them alone, as in the portable form.

Source: Mamba-2, arXiv 2405.21060, section 6. Names: pointers `p_`, blocks `b_`, offsets `o_`. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import load_rows, product, store_rows

# Lengths and numbers of heads change from call to call.
_ANY = ["length", "heads", "group", "chunks"]


@triton.jit
def locate(heads, chunks):
    """Image, head and chunk of a program. Heads vary fastest, because the heads of a chunk share B and C."""
    program = tl.program_id(0)
    return program // heads // chunks, program % heads, program // heads % chunks


@triton.jit
def positions(chunk, length, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """Where the steps of a chunk are in memory, and which of them are real."""
    o_steps = chunk * CHUNK + tl.arange(0, CHUNK)
    b_real = o_steps < length
    if REVERSE:
        o_steps = length - 1 - o_steps
    return o_steps.to(tl.int64), b_real


@triton.jit
def step_sizes(p_dt, p_decay, batch, head, heads, length, o_steps, b_real):
    """dt of the steps and the exponents of their decays; 0 where a step is not real, so that it holds the state."""
    b_dt = tl.load(p_dt + (batch.to(tl.int64) * length + o_steps) * heads + head, mask=b_real, other=0.0).to(tl.float32)
    return b_dt, b_dt * tl.load(p_decay + head).to(tl.float32)


@triton.jit
def row_offsets(batch, row, rows, length, o_steps, WIDTH: tl.constexpr):
    """Offsets of vectors in a contiguous (B, L, rows, WIDTH)."""
    return ((batch.to(tl.int64) * length + o_steps) * rows + row) * WIDTH


@triton.jit
def state_offset(batch, chunk, head, heads, chunks, SIZE: tl.constexpr):
    """Offset of a state in a contiguous (B, chunks, H, SIZE)."""
    return ((batch.to(tl.int64) * chunks + chunk) * heads + head) * SIZE


@triton.jit
def between(b_exponent, CHUNK: tl.constexpr):
    """(t, s): the product of the decays of the steps after s up to t; 0 where s is after t."""
    o_t = tl.arange(0, CHUNK)[:, None]
    o_s = tl.arange(0, CHUNK)[None, :]
    b_sum = tl.cumsum(tl.where(o_t > o_s, b_exponent[:, None], 0.0), 0)
    return tl.where(o_t >= o_s, tl.exp(tl.where(o_t >= o_s, b_sum, 0.0)), 0.0)


@triton.jit
def to_end(b_exponent):
    """The product of the decays after each step, up to the last step of the chunk."""
    return tl.exp(tl.cumsum(b_exponent, 0, reverse=True) - b_exponent)


@triton.jit
def load_state(p_state, o_state, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    o_n = tl.arange(0, BLOCK_N)
    return load_rows(p_state, o_state + o_n.to(tl.int64) * P, o_n < N, P, BLOCK_P)


@triton.jit(do_not_specialize=_ANY)
def states(
    p_x,
    p_dt,
    p_decay,
    p_rows,
    p_state,
    p_whole,
    length,
    heads,
    group,
    chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What a chunk adds to the state behind it, and the product of its decays.

    With GRADIENT, `p_x` is the output's gradient and `p_rows` is C; the result is what the chunk adds to the gradient
    of the state in front of it.
    """
    batch, head, chunk = locate(heads, chunks)
    o_steps, b_real = positions(chunk, length, REVERSE, CHUNK)
    b_dt, b_exponent = step_sizes(p_dt, p_decay, batch, head, heads, length, o_steps, b_real)
    b_x = load_rows(p_x, row_offsets(batch, head, heads, length, o_steps, P), b_real, P, BLOCK_P)
    groups = heads // group
    o_rows = row_offsets(batch, head // group, groups, length, o_steps, N)
    b_rows = load_rows(p_rows, o_rows, b_real, N, BLOCK_N)
    if GRADIENT:
        b_weight = tl.exp(tl.cumsum(b_exponent, 0))
    else:
        b_weight = to_end(b_exponent) * b_dt
    b_weighted = (b_x.to(tl.float32) * b_weight[:, None]).to(b_x.dtype)
    b_zero = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    b_state = product(tl.trans(b_rows), b_weighted, b_zero, PRECISION, INTERPRETED)
    o_n = tl.arange(0, BLOCK_N)
    o_state = state_offset(batch, chunk, head, heads, chunks, N * P)
    store_rows(p_state, o_state + o_n.to(tl.int64) * P, b_state, o_n < N, P, BLOCK_P)
    if not GRADIENT:
        tl.store(p_whole + state_offset(batch, chunk, head, heads, chunks, 1), tl.exp(tl.sum(b_exponent, 0)))


@triton.jit(do_not_specialize=_ANY)
def carry(p_state, p_whole, heads, chunks, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """Replace each chunk's addition by the state in front of the chunk (BACKWARD: the gradient behind it), in place."""
    program = tl.program_id(0)
    item = program // parts
    batch = item // heads
    head = item % heads
    o_part = program % parts * BLOCK + tl.arange(0, BLOCK)
    b_own = o_part < SIZE
    b_state = tl.zeros([BLOCK], tl.float32)
    for step in range(0, chunks):
        chunk = step
        if BACKWARD:
            chunk = chunks - 1 - step
        o_state = state_offset(batch, chunk, head, heads, chunks, SIZE) + o_part
        b_added = tl.load(p_state + o_state, mask=b_own, other=0.0)
        tl.store(p_state + o_state, b_state, mask=b_own)
        b_state = tl.load(p_whole + state_offset(batch, chunk, head, heads, chunks, 1)) * b_state + b_added


@triton.jit(do_not_specialize=_ANY)
def outputs(
    p_x,
    p_dt,
    p_decay,
    p_b,
    p_c,
    p_state,
    p_out,
    length,
    heads,
    group,
    chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A chunk's outputs from its inputs and the state in front of it."""
    batch, head, chunk = locate(heads, chunks)
    o_steps, b_real = positions(chunk, length, REVERSE, CHUNK)
    b_dt, b_exponent = step_sizes(p_dt, p_decay, batch, head, heads, length, o_steps, b_real)
    o_x = row_offsets(batch, head, heads, length, o_steps, P)
    o_rows = row_offsets(batch, head // group, heads // group, length, o_steps, N)
    b_x = load_rows(p_x, o_x, b_real, P, BLOCK_P)
    b_b = load_rows(p_b, o_rows, b_real, N, BLOCK_N)
    b_c = load_rows(p_c, o_rows, b_real, N, BLOCK_N)
    o_state = state_offset(batch, chunk, head, heads, chunks, N * P)
    b_state = load_state(p_state, o_state, N, P, BLOCK_N, BLOCK_P)
    b_zero = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    b_out = product(b_c, b_state.to(b_c.dtype), b_zero, PRECISION, INTERPRETED)
    b_out *= tl.exp(tl.cumsum(b_exponent, 0))[:, None]
    b_zero = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_weight = product(b_c, tl.trans(b_b), b_zero, PRECISION, INTERPRETED) * between(b_exponent, CHUNK)
    b_weight *= b_dt[None, :]
    b_out = product(b_weight.to(b_x.dtype), b_x, b_out, PRECISION, INTERPRETED)
    store_rows(p_out, o_x, b_out, b_real, P, BLOCK_P)


@triton.jit(do_not_specialize=_ANY)
def gradients(
    p_x,
    p_dt,
    p_decay,
    p_b,
    p_c,
    p_state,
    p_grad,
    p_grad_state,
    p_grad_x,
    p_grad_dt,
    p_grad_b,
    p_grad_c,
    p_grad_exponent,
    length,
    heads,
    group,
    chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A chunk's gradients from the state in front of it and the gradient of the state behind it.

    The gradients of B and C are separate for each head, (B, L, H, N) in float32. The gradient of the decays' exponents
    is an output, too.
    """
    batch, head, chunk = locate(heads, chunks)
    o_steps, b_real = positions(chunk, length, REVERSE, CHUNK)
    b_dt, b_exponent = step_sizes(p_dt, p_decay, batch, head, heads, length, o_steps, b_real)
    o_x = row_offsets(batch, head, heads, length, o_steps, P)
    o_rows = row_offsets(batch, head // group, heads // group, length, o_steps, N)
    b_x = load_rows(p_x, o_x, b_real, P, BLOCK_P)
    b_grad = load_rows(p_grad, o_x, b_real, P, BLOCK_P)
    b_b = load_rows(p_b, o_rows, b_real, N, BLOCK_N)
    b_c = load_rows(p_c, o_rows, b_real, N, BLOCK_N)
    o_state = state_offset(batch, chunk, head, heads, chunks, N * P)
    b_until = to_end(b_exponent)
    b_zero = tl.zeros([CHUNK, CHUNK], tl.float32)

    # For each pair of steps: the weight is C_t B_s times the decays between them; b_pair is the weight's gradient.
    b_between = between(b_exponent, CHUNK)
    b_weight = product(b_c, tl.trans(b_b), b_zero, PRECISION, INTERPRETED) * b_between
    b_pair = product(b_grad, tl.trans(b_x), b_zero, PRECISION, INTERPRETED) * b_dt[None, :]
    b_product = (b_pair * b_between).to(b_x.dtype)

    # A decay counts for the pairs of steps around it. They are summed directly, never by differences of larger sums.
    o_t = tl.arange(0, CHUNK)
    b_later = tl.cumsum(b_pair * b_weight, 0, reverse=True)
    b_grad_exponent = tl.sum(tl.where(o_t[:, None] > o_t[None, :], b_later, 0.0), 1)

    # The state behind depends on the inputs and on the state in front.
    b_behind = load_state(p_grad_state, o_state, N, P, BLOCK_N, BLOCK_P)
    b_zero = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    b_made = product(b_x, tl.trans(b_behind).to(b_x.dtype), b_zero, PRECISION, INTERPRETED) * (b_until * b_dt)[:, None]
    b_makes = tl.sum(b_b.to(tl.float32) * b_made, 1)
    b_grad_exponent += tl.cumsum(b_makes, 0) - b_makes
    o_own = row_offsets(batch, head, heads, length, o_steps, N)
    b_made = product(tl.trans(b_product), b_c, b_made, PRECISION, INTERPRETED)
    store_rows(p_grad_b, o_own, b_made, b_real, N, BLOCK_N)
    b_zero = tl.zeros([CHUNK, BLOCK_P], tl.float32)
    b_into = product(b_b, b_behind.to(b_b.dtype), b_zero, PRECISION, INTERPRETED) * b_until[:, None]
    b_into = product(tl.trans(b_weight).to(b_grad.dtype), b_grad, b_into, PRECISION, INTERPRETED)
    store_rows(p_grad_x, o_x, b_into * b_dt[:, None], b_real, P, BLOCK_P)
    b_grad_dt = tl.sum(b_into * b_x.to(tl.float32), 1)

    # The state in front contributes to the outputs and to the state behind.
    b_state = load_state(p_state, o_state, N, P, BLOCK_N, BLOCK_P)
    b_grad_exponent += tl.sum(b_state * b_behind) * tl.exp(tl.sum(b_exponent, 0))
    b_zero = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    b_read = product(b_grad, tl.trans(b_state).to(b_grad.dtype), b_zero, PRECISION, INTERPRETED)
    b_read *= tl.exp(tl.cumsum(b_exponent, 0))[:, None]
    b_grad_exponent += tl.cumsum(tl.sum(b_c.to(tl.float32) * b_read, 1), 0, reverse=True)
    b_read = product(b_product, b_b, b_read, PRECISION, INTERPRETED)
    store_rows(p_grad_c, o_own, b_read, b_real, N, BLOCK_N)

    b_grad_dt += b_grad_exponent * tl.load(p_decay + head).to(tl.float32)
    o_dt = (batch.to(tl.int64) * length + o_steps) * heads + head
    tl.store(p_grad_dt + o_dt, b_grad_dt.to(p_grad_dt.dtype.element_ty), mask=b_real)
    tl.store(p_grad_exponent + o_dt, b_grad_exponent * b_dt, mask=b_real)

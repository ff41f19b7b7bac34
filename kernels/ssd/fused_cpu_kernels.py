"""The state space dual step by step on a CPU: states stay in vector registers over a chunk of steps.

A chunk of steps goes over its states a block at a time, LANES channels in a vector; so a step costs three operations
for each number of the state, as many as the products over chunks need, and no matrix is written to memory. Numba
compiles the kernels at the first call. Arrays are flat: x, B, C and grad with the steps between their images, positions
and heads (groups), and with contiguous channels; dt and decay (B, L, H), out and dx (B, L, H, P), kept (B, chunks, H,
N, P), all contiguous. P is a multiple of LANES.

Arguments: sizes (L, H, groups, N, P); reverse, whether the last position is the first step.
"""

import numpy as np
from numba.extending import register_jitable

from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES
from terrazzo.kernels.numba_host.fused_vectors import (
    add_dot,
    add_multiples,
    add_products,
    add_scaled,
    dot,
    load,
    load_all,
    multiply_all,
    spread,
    store,
    store_all,
    sum_of,
)
from terrazzo.kernels.ssd.fused_cpu import CHUNK, TILES

_inline = register_jitable(forceinline=True)

# States whose vectors are in registers at once. A rest is computed one state at a time.
BLOCK = 8


@_inline
def position(step, length, reverse):
    return length - 1 - step if reverse else step


@_inline
def along(at, reverse):
    """The numbers from a step's place in an array to the next step's, given the numbers to the next position's."""
    return -at if reverse else at


@_inline
def gathered(x, row, step, steps, own, states):
    """Copy the states of a chunk's steps side by side: rows that are far apart push each other out of the caches."""
    for s in range(steps):
        at, to = row + s * step, s * states
        for n in range(0, states // LANES * LANES, LANES):
            store(own, to + n, load(x, at + n))
        for n in range(states // LANES * LANES, states):
            own[to + n] = x[at + n]


def _run_of(count):
    @_inline
    def run(state, n, decays, dx, B, C, step, steps, y):
        h = load_all(state, n * LANES, LANES, count)
        for s in range(steps):
            h = add_multiples(multiply_all(h, spread(decays, s)), load(dx, s * LANES), B, s * step + n)
            store(y, s * LANES, add_dot(load(y, s * LANES), h, C, s * step + n))
        store_all(state, n * LANES, LANES, h)

    return run


_run_block, _run_one = _run_of(BLOCK), _run_of(1)


@jit
def forward(x, x_at, dt, decay, B, b_at, C, c_at, out, kept, reverse, sizes, begin, end):
    """The output, and the state before each chunk of steps.

    Units are at most TILES times LANES channels of a head of an image.
    """
    length, heads, groups, states, width = sizes
    dtype, tiles = x.dtype.type, width // LANES
    parts, chunks = (tiles + TILES - 1) // TILES, (length + CHUNK - 1) // CHUNK
    all_states, decays = np.empty(TILES * states * LANES, dtype), np.empty(CHUNK, dtype)
    dx, y = np.empty(CHUNK * LANES, dtype), np.empty(CHUNK * LANES, dtype)
    own_b, own_c = np.empty(CHUNK * states, dtype), np.empty(CHUNK * states, dtype)
    b_step, c_step = along(b_at[1], reverse), along(c_at[1], reverse)
    whole = states // BLOCK * BLOCK
    for unit in range(begin, end):
        head, part = unit // parts, unit % parts
        image, head = head // heads, head % heads
        group = head // (heads // groups)
        all_states[:] = 0
        for chunk in range(chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            first = position(start, length, reverse)
            for s in range(steps):
                decays[s] = decay[(image * length + position(start + s, length, reverse)) * heads + head]
            gathered(B, image * b_at[0] + first * b_at[1] + group * b_at[2], b_step, steps, own_b, states)
            gathered(C, image * c_at[0] + first * c_at[1] + group * c_at[2], c_step, steps, own_c, states)
            for tile in range(part * TILES, min(tiles, (part + 1) * TILES)):
                at, state = tile * LANES, all_states[(tile - part * TILES) * states * LANES :]
                keep_at = ((image * chunks + chunk) * heads + head) * states * width + at
                for n in range(states):
                    store(kept, keep_at + n * width, load(state, n * LANES))
                for s in range(steps):
                    p = position(start + s, length, reverse)
                    x_row = image * x_at[0] + p * x_at[1] + head * x_at[2] + at
                    store(dx, s * LANES, load(x, x_row) * dt[(image * length + p) * heads + head])
                y[:] = 0
                for n in range(0, whole, BLOCK):
                    _run_block(state, n, decays, dx, own_b, own_c, states, steps, y)
                for n in range(whole, states):
                    _run_one(state, n, decays, dx, own_b, own_c, states, steps, y)
                for s in range(steps):
                    p = position(start + s, length, reverse)
                    store(out, ((image * length + p) * heads + head) * width + at, load(y, s * LANES))


def _again_of(count):
    @_inline
    def again(kept, at, width, decays, dx, B, b_at, b_step, steps, h):
        """States before each step of a chunk, from the state before the chunk, and after the last step."""
        states = load_all(kept, at, width, count)
        store_all(h, 0, LANES, states)
        for s in range(steps):
            states = add_multiples(multiply_all(states, spread(decays, s)), load(dx, s * LANES), B, b_at + s * b_step)
            store_all(h, (s + 1) * count * LANES, LANES, states)

    return again


def _back_of(count):
    @_inline
    def back(carried, at, h, decays, dx, dy, B, b_at, b_step, C, c_at, c_step, steps, of_input, flow, lanes_b, lanes_c):
        """The steps of a chunk from the last to the first, for a block of states and LANES channels."""
        block = count * LANES
        g = load_all(carried, at, LANES, count)
        for s in range(steps - 1, -1, -1):
            given, into, place = load(dy, s * LANES), load(dx, s * LANES), s * block
            of_c = add_products(load_all(lanes_c, place, LANES, count), given, h, place + block, LANES)
            store_all(lanes_c, place, LANES, of_c)
            g = add_multiples(g, given, C, c_at + s * c_step)
            store_all(lanes_b, place, LANES, add_scaled(load_all(lanes_b, place, LANES, count), into, g))
            store(of_input, s * LANES, add_dot(load(of_input, s * LANES), g, B, b_at + s * b_step))
            g = multiply_all(g, spread(decays, s))
            store(flow, s * LANES, dot(load(flow, s * LANES), g, h, place, LANES))
        store_all(carried, at, LANES, g)

    return back


def _block_of(count):
    again, back = _again_of(count), _back_of(count)

    @_inline
    def block(
        n, kept, keep_at, width, carried, h, decays, dx, dy, B, b_at, b_step, C, c_at, c_step, steps, of_input, flow,
        lanes_b, lanes_c, dB, dC, sums_at, sums_step,
    ):  # fmt: skip
        """Gradients by a block of states over a chunk, all channels of a head."""
        lanes_b[: steps * count * LANES] = 0
        lanes_c[: steps * count * LANES] = 0
        for p in range(0, width, LANES):
            inputs, given, found = dx[p * CHUNK :], dy[p * CHUNK :], of_input[p * CHUNK :]
            again(kept, keep_at + p, width, decays, inputs, B, b_at, b_step, steps, h)
            back(
                carried, n * width + p * count, h, decays, inputs, given, B, b_at, b_step, C, c_at, c_step, steps,
                found, flow, lanes_b, lanes_c,
            )  # fmt: skip
        for s in range(steps):
            for i in range(count):
                place = (s * count + i) * LANES
                dB[sums_at + s * sums_step + i] = sum_of(load(lanes_b, place))
                dC[sums_at + s * sums_step + i] = sum_of(load(lanes_c, place))

    return block


_block, _one = _block_of(BLOCK), _block_of(1)


@jit
def backward(
    grad, grad_at, x, x_at, dt, decay, B, b_at, C, c_at, kept, reverse, sizes, dx_out, of_step, of_decay, dB, dC,
    begin, end,
):  # fmt: skip
    """Gradients; the states within a chunk are computed again. Units are heads of an image.

    Args:
        dx_out: the gradient of x.
        of_step, of_decay: (B, L, H), gradients of dt where it multiplies x, and of dt A.
        dB, dC: (B, L, H, N), gradients by heads.
    """
    length, heads, groups, states, width = sizes
    dtype, chunks = x.dtype.type, (length + CHUNK - 1) // CHUNK
    carried, decays, flow = np.empty(states * width, dtype), np.empty(CHUNK, dtype), np.empty(CHUNK * LANES, dtype)
    dx, dy, of_input = (np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype), np.empty(CHUNK * width, dtype))
    h = np.empty((CHUNK + 1) * BLOCK * LANES, dtype)
    lanes_b, lanes_c = np.empty(CHUNK * BLOCK * LANES, dtype), np.empty(CHUNK * BLOCK * LANES, dtype)
    own_b, own_c = np.empty(CHUNK * states, dtype), np.empty(CHUNK * states, dtype)
    b_step, c_step = along(b_at[1], reverse), along(c_at[1], reverse)
    sums_step = along(heads * states, reverse)
    whole = states // BLOCK * BLOCK
    for unit in range(begin, end):
        image, head = unit // heads, unit % heads
        group = head // (heads // groups)
        carried[:] = 0
        for chunk in range(chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            first = position(start, length, reverse)
            for s in range(steps):
                p = position(start + s, length, reverse)
                own = (image * length + p) * heads + head
                decays[s] = decay[own]
                x_row = image * x_at[0] + p * x_at[1] + head * x_at[2]
                grad_row = image * grad_at[0] + p * grad_at[1] + head * grad_at[2]
                for i in range(0, width, LANES):
                    store(dx, i * CHUNK + s * LANES, load(x, x_row + i) * dt[own])
                    store(dy, i * CHUNK + s * LANES, load(grad, grad_row + i))
            of_input[:] = 0
            flow[:] = 0
            gathered(B, image * b_at[0] + first * b_at[1] + group * b_at[2], b_step, steps, own_b, states)
            gathered(C, image * c_at[0] + first * c_at[1] + group * c_at[2], c_step, steps, own_c, states)
            sums_at = ((image * length + first) * heads + head) * states
            keep_at = ((image * chunks + chunk) * heads + head) * states * width
            for n in range(0, whole, BLOCK):
                _block(
                    n, kept, keep_at + n * width, width, carried, h, decays, dx, dy, own_b, n, states, own_c, n, states,
                    steps, of_input, flow, lanes_b, lanes_c, dB, dC, sums_at + n, sums_step,
                )  # fmt: skip
            for n in range(whole, states):
                _one(
                    n, kept, keep_at + n * width, width, carried, h, decays, dx, dy, own_b, n, states, own_c, n, states,
                    steps, of_input, flow, lanes_b, lanes_c, dB, dC, sums_at + n, sums_step,
                )  # fmt: skip
            for s in range(steps):
                p = position(start + s, length, reverse)
                own = (image * length + p) * heads + head
                x_row = image * x_at[0] + p * x_at[1] + head * x_at[2]
                total = load(flow, s * LANES) * dtype(0)
                for i in range(0, width, LANES):
                    found = load(of_input, i * CHUNK + s * LANES)
                    store(dx_out, own * width + i, found * dt[own])
                    total = total + load(x, x_row + i) * found
                of_step[own] = sum_of(total)
                of_decay[own] = sum_of(load(flow, s * LANES))

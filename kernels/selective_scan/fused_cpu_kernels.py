"""The selective scan step by step on a CPU: states stay in the nearest cache, and each step is computed once.

A program owns some channels of an image, WIDE at a time. Numba compiles the kernels at the first call. Arrays are
flat; `u_at` and similar arguments hold the steps between images, pixels and scans, and channels lie side by side. A is
(K, N, D) times log2(e); skip (the operator's D) and bias are (K, D), or empty; `positive` says whether delta goes
through a softplus; index is (K, L), the pixel of each step. D is a multiple of WIDE.
"""

import numpy as np

from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_constants import LANES, LOG2_E, WIDE
from terrazzo.kernels.numba_host.fused_maths import exp2, softplus, vanishing
from terrazzo.kernels.numba_host.fused_vectors import (
    above,
    load_all,
    load_wide,
    splat,
    store,
    store_all,
    sum_of,
    turned,
)
from terrazzo.kernels.selective_scan.fused_cpu import CHUNK


@jit
def turn(x, at, step, count, width, out):
    """Write `count` rows of `width` numbers, the columns of `width` rows of x that are `step` apart."""
    whole = count // LANES * LANES
    for c in range(0, width, LANES):
        for t in range(0, whole, LANES):
            store_all(out, t * width + c, width, turned(load_all(x, at + c * step + t, step, LANES)))
        for t in range(whole, count):
            for i in range(c, c + LANES):
                out[t * width + i] = x[at + i * step + t]


@jit
def forward(
    u,
    u_at,
    delta,
    delta_at,
    A,
    B,
    b_at,
    C,
    c_at,
    skip,
    bias,
    positive,
    index,
    by_channels,
    out,
    out_at,
    kept,
    image,
    first,
    width,
):
    """The scans of channels `first` to `first + width`.

    Args:
        by_channels: whether the pixels of u and delta lie side by side, and not the channels. Then `u_at` and
            `delta_at` hold the steps between images, scans and channels, and every order goes by rows.
        out: the sum of all scans if the step between scans is 0.
        kept: (B, chunks, K, N, D), the state before each chunk of steps.
    """
    scans, length = index.shape
    dtype = u.dtype.type
    channels = kept.shape[4]
    states = kept.shape[3]
    zero = splat(dtype(0))
    h, kept_flat = np.empty(states * width, dtype), kept.reshape(-1)
    # Of one chunk, with channels side by side.
    part = CHUNK * width if by_channels else 0
    near_u, near_delta = np.empty(part, dtype), np.empty(part, dtype)
    from_u, from_delta, low = (near_u, near_delta, 0) if by_channels else (u, delta, 0)
    for k in range(scans):
        h[:] = 0
        for t in range(length):
            if t % CHUNK == 0:
                at = ((image * kept.shape[1] + t // CHUNK) * scans + k) * states * channels + first
                for n in range(states):
                    for i in range(0, width, WIDE):
                        store(kept_flat, at + n * channels + i, load_wide(h, n * width + i))
                if by_channels:
                    steps = min(CHUNK, length - t)
                    low = min(index[k, t], index[k, t + steps - 1])
                    at = image * u_at[0] + k * u_at[1] + first * u_at[2] + low
                    turn(u, at, u_at[2], steps, width, near_u)
                    at = image * delta_at[0] + k * delta_at[1] + first * delta_at[2] + low
                    turn(delta, at, delta_at[2], steps, width, near_delta)
            p = index[k, t]
            if by_channels:
                u_row = delta_row = (p - low) * width
            else:
                u_row = image * u_at[0] + p * u_at[1] + k * u_at[2] + first
                delta_row = image * delta_at[0] + p * delta_at[1] + k * delta_at[2] + first
            b_row = image * b_at[0] + p * b_at[1] + k * b_at[2]
            c_row = image * c_at[0] + p * c_at[1] + k * c_at[2]
            out_row = image * out_at[0] + p * out_at[1] + k * out_at[2] + first
            for i in range(0, width, WIDE):
                own = k * channels + first + i
                dt = load_wide(from_delta, delta_row + i)
                if bias.size > 0:
                    dt = dt + load_wide(bias, own)
                if positive:
                    dt = softplus(dt, vanishing(dt))
                x = load_wide(from_u, u_row + i)
                dx = dt * x
                y = zero
                if skip.size > 0:
                    y = x * load_wide(skip, own)
                if k > 0 and out_at[2] == 0:
                    y = y + load_wide(out, out_row + i)
                for n in range(states):
                    decay = exp2(dt * load_wide(A, (k * states + n) * channels + first + i))
                    state = decay * load_wide(h, n * width + i) + dx * B[b_row + n]
                    store(h, n * width + i, state)
                    y = y + state * C[c_row + n]
                store(out, out_row + i, y)


@jit
def backward(
    u,
    u_at,
    delta,
    delta_at,
    A,
    B,
    b_at,
    C,
    c_at,
    skip,
    bias,
    positive,
    index,
    grad,
    grad_at,
    kept,
    du,
    du_at,
    ddelta,
    ddelta_at,
    dA,
    dB,
    dC,
    dskip,
    dbias,
    image,
    group,
    first,
    width,
):
    """Gradients by the channels `first` to `first + width`; the states within a chunk are computed again.

    Args:
        grad: the gradient of `out`.
        du, ddelta: in the shapes of u and delta.
        dA: (B, K, N, D), by A itself. dskip, dbias: (B, K, D).
        dB, dC: (groups, B, L, K, N), sums over the channels of a group.
    """
    scans, length = index.shape
    dtype = u.dtype.type
    channels = kept.shape[4]
    states = kept.shape[3]
    log2_e, one, zero = dtype(LOG2_E), splat(dtype(1)), splat(dtype(0))
    carried, sums_a = np.empty(states * width, dtype), np.empty(states * width, dtype)
    # Of one chunk and WIDE channels: states before each step and decays, step sizes and their slopes.
    h, decays = np.empty((CHUNK + 1) * states * WIDE, dtype), np.empty(CHUNK * states * WIDE, dtype)
    dts, slopes = np.empty(CHUNK * WIDE, dtype), np.empty(CHUNK * WIDE, dtype)
    lanes_b, lanes_c = np.empty(CHUNK * states * WIDE, dtype), np.empty(CHUNK * states * WIDE, dtype)
    kept_flat, dA_flat, dskip_flat, dbias_flat = kept.reshape(-1), dA.reshape(-1), dskip.reshape(-1), dbias.reshape(-1)
    block = states * WIDE
    for k in range(scans):
        carried[:] = 0
        sums_a[:] = 0
        for chunk in range(kept.shape[1] - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            lanes_b[: steps * block] = 0
            lanes_c[: steps * block] = 0
            for i in range(0, width, WIDE):
                own, own_a = k * channels + first + i, k * states * channels + first + i
                at = ((image * kept.shape[1] + chunk) * scans + k) * states * channels + first + i
                for n in range(states):
                    store(h, n * WIDE, load_wide(kept_flat, at + n * channels))
                for t in range(steps):
                    p = index[k, start + t]
                    dt, slope = (
                        load_wide(delta, image * delta_at[0] + p * delta_at[1] + k * delta_at[2] + first + i),
                        one,
                    )
                    if bias.size > 0:
                        dt = dt + load_wide(bias, own)
                    if positive:
                        e = vanishing(dt)
                        slope = above(dt, zero, one, e) / (e + one)
                        dt = softplus(dt, e)
                    store(dts, t * WIDE, dt)
                    store(slopes, t * WIDE, slope)
                    dx = dt * load_wide(u, image * u_at[0] + p * u_at[1] + k * u_at[2] + first + i)
                    b_row = image * b_at[0] + p * b_at[1] + k * b_at[2]
                    for n in range(states):
                        decay = exp2(dt * load_wide(A, own_a + n * channels))
                        store(decays, t * block + n * WIDE, decay)
                        state = decay * load_wide(h, t * block + n * WIDE) + dx * B[b_row + n]
                        store(h, (t + 1) * block + n * WIDE, state)
                for t in range(steps - 1, -1, -1):
                    p = index[k, start + t]
                    dy = load_wide(grad, image * grad_at[0] + p * grad_at[1] + k * grad_at[2] + first + i)
                    x = load_wide(u, image * u_at[0] + p * u_at[1] + k * u_at[2] + first + i)
                    dt = load_wide(dts, t * WIDE)
                    dx, ddt, from_state = dt * x, zero, zero
                    b_row = image * b_at[0] + p * b_at[1] + k * b_at[2]
                    c_row = image * c_at[0] + p * c_at[1] + k * c_at[2]
                    for n in range(states):
                        j, own_n = t * block + n * WIDE, n * width + i
                        g = load_wide(carried, own_n) + dy * C[c_row + n]
                        store(lanes_c, j, load_wide(lanes_c, j) + load_wide(h, j + block) * dy)
                        store(lanes_b, j, load_wide(lanes_b, j) + g * dx)
                        from_state = from_state + g * B[b_row + n]
                        back = g * load_wide(decays, j)
                        flow = back * load_wide(h, j)
                        ddt = ddt + flow * load_wide(A, own_a + n * channels)
                        store(sums_a, own_n, load_wide(sums_a, own_n) + flow * dt)
                        store(carried, own_n, back)
                    # A is times log2(e), so that its sum is, too.
                    change = (ddt / log2_e + x * from_state) * load_wide(slopes, t * WIDE)
                    store(ddelta, image * ddelta_at[0] + p * ddelta_at[1] + k * ddelta_at[2] + first + i, change)
                    from_u = dt * from_state
                    sums = image * scans * channels + own
                    if bias.size > 0:
                        store(dbias_flat, sums, load_wide(dbias_flat, sums) + change)
                    if skip.size > 0:
                        store(dskip_flat, sums, load_wide(dskip_flat, sums) + dy * x)
                        from_u = from_u + dy * load_wide(skip, own)
                    du_row = image * du_at[0] + p * du_at[1] + k * du_at[2] + first + i
                    if k > 0 and du_at[2] == 0:
                        from_u = from_u + load_wide(du, du_row)
                    store(du, du_row, from_u)
            for t in range(steps):
                p = index[k, start + t]
                for n in range(states):
                    dB[group, image, p, k, n] = sum_of(load_wide(lanes_b, t * block + n * WIDE))
                    dC[group, image, p, k, n] = sum_of(load_wide(lanes_c, t * block + n * WIDE))
        for n in range(states):
            at = ((image * scans + k) * states + n) * channels + first
            for i in range(0, width, WIDE):
                store(dA_flat, at + i, load_wide(sums_a, n * width + i))

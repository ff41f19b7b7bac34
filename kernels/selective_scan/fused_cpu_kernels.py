"""The selective scan step by step on a CPU: states stay in the nearest cache, and each step is computed once.

A program owns WIDTH channels of an image, and loops over them become vector instructions. Numba compiles the kernels at
the first call. Arrays are contiguous: u (B, L, 1 or K, D), delta (B, L, K, D), A (K, N, D) times log2(e), B and C
(B, L, K, N), skip (the operator's D) and bias (K, D), or (0, D) for none, and index (K, L), the pixel of each step.
"""

import numpy as np

from terrazzo.kernels.numba_host.fused_compile import jit
from terrazzo.kernels.numba_host.fused_maths import exp2, log1p
from terrazzo.kernels.selective_scan.fused_cpu import CHUNK, LOG2_E, WIDTH


@jit
def forward(u, delta, A, B, C, skip, bias, softplus, index, out, kept, image, first):
    """The scans of channels `first` to `first + WIDTH`.

    Args:
        out: (B, L, 1, D), the sum of all scans, or (B, L, K, D).
        kept: (B, chunks, K, N, D), the state before each chunk of steps.
    """
    scans, states, length = A.shape[0], A.shape[1], u.shape[1]
    dtype = u.dtype
    log2_e, limit = dtype.type(LOG2_E), dtype.type(20)
    decay, h = np.empty((states, WIDTH), dtype), np.empty((states, WIDTH), dtype)
    dt, dx, y = np.empty(WIDTH, dtype), np.empty(WIDTH, dtype), np.empty(WIDTH, dtype)
    for k in range(scans):
        own_u, own_out = k if u.shape[2] > 1 else 0, k if out.shape[2] > 1 else 0
        for n in range(states):
            for j in range(WIDTH):
                decay[n, j] = A[k, n, first + j]
                h[n, j] = 0
        for t in range(length):
            if t % CHUNK == 0:
                for n in range(states):
                    for j in range(WIDTH):
                        kept[image, t // CHUNK, k, n, first + j] = h[n, j]
            p = index[k, t]
            for j in range(WIDTH):
                dt[j] = delta[image, p, k, first + j]
            if bias.shape[0] > 0:
                for j in range(WIDTH):
                    dt[j] += bias[k, first + j]
            if softplus:
                for j in range(WIDTH):
                    x = dt[j]
                    small = log1p(exp2((limit if x > limit else x) * log2_e))
                    dt[j] = x if x > limit else small
            for j in range(WIDTH):
                dx[j] = dt[j] * u[image, p, own_u, first + j]
                y[j] = 0
            for n in range(states):
                b, c = B[image, p, k, n], C[image, p, k, n]
                for j in range(WIDTH):
                    h[n, j] = exp2(dt[j] * decay[n, j]) * h[n, j] + dx[j] * b
                    y[j] += c * h[n, j]
            if skip.shape[0] > 0:
                for j in range(WIDTH):
                    y[j] += skip[k, first + j] * u[image, p, own_u, first + j]
            if k > 0 and own_out == 0:
                for j in range(WIDTH):
                    out[image, p, own_out, first + j] += y[j]
            else:
                for j in range(WIDTH):
                    out[image, p, own_out, first + j] = y[j]


@jit
def backward(
    u,
    delta,
    A,
    B,
    C,
    skip,
    bias,
    softplus,
    index,
    grad,
    kept,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dskip,
    dbias,
    image,
    group,
    groups,
):
    """Gradients by the channels of one group of programs; the states within a chunk are computed again.

    Args:
        grad: the gradient of `out`, in its shape.
        du, ddelta: in the shapes of u and delta.
        dA: (B, K, N, D), by A itself. dskip, dbias: (B, K, D).
        dB, dC: (groups, B, L, K, N), sums over the channels of a group.
    """
    scans, states, length, channels = A.shape[0], A.shape[1], u.shape[1], u.shape[3]
    dtype = u.dtype
    log2_e, one, limit = dtype.type(LOG2_E), dtype.type(1), dtype.type(20)
    blocks = channels // WIDTH
    begin, end = blocks * group // groups, blocks * (group + 1) // groups
    carried = np.empty((end - begin, states, WIDTH), dtype)
    sums_a = np.empty((end - begin, states, WIDTH), dtype)
    h = np.empty((CHUNK + 1, states, WIDTH), dtype)
    decays = np.empty((CHUNK, states, WIDTH), dtype)
    dts, slopes = np.empty((CHUNK, WIDTH), dtype), np.empty((CHUNK, WIDTH), dtype)
    lanes_b, lanes_c = np.empty((CHUNK, states, WIDTH), dtype), np.empty((CHUNK, states, WIDTH), dtype)
    dx, dy, ddt, from_state = (
        np.empty(WIDTH, dtype),
        np.empty(WIDTH, dtype),
        np.empty(WIDTH, dtype),
        np.empty(WIDTH, dtype),
    )
    chunks = (length + CHUNK - 1) // CHUNK
    for k in range(scans):
        own_u, own_out = k if u.shape[2] > 1 else 0, k if grad.shape[2] > 1 else 0
        carried[:] = 0
        sums_a[:] = 0
        for chunk in range(chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            lanes_b[:steps] = 0
            lanes_c[:steps] = 0
            for block in range(end - begin):
                first = (begin + block) * WIDTH
                for n in range(states):
                    for j in range(WIDTH):
                        h[0, n, j] = kept[image, chunk, k, n, first + j]
                for t in range(steps):
                    p = index[k, start + t]
                    for j in range(WIDTH):
                        dts[t, j] = delta[image, p, k, first + j]
                        slopes[t, j] = one
                    if bias.shape[0] > 0:
                        for j in range(WIDTH):
                            dts[t, j] += bias[k, first + j]
                    if softplus:
                        for j in range(WIDTH):
                            x = dts[t, j]
                            e = exp2((limit if x > limit else x) * log2_e)
                            slopes[t, j] = one if x > limit else e / (one + e)
                            dts[t, j] = x if x > limit else log1p(e)
                    for j in range(WIDTH):
                        dx[j] = dts[t, j] * u[image, p, own_u, first + j]
                    for n in range(states):
                        b = B[image, p, k, n]
                        for j in range(WIDTH):
                            a = exp2(dts[t, j] * A[k, n, first + j])
                            decays[t, n, j] = a
                            h[t + 1, n, j] = a * h[t, n, j] + dx[j] * b
                for t in range(steps - 1, -1, -1):
                    p = index[k, start + t]
                    for j in range(WIDTH):
                        dy[j] = grad[image, p, own_out, first + j]
                        dx[j] = dts[t, j] * u[image, p, own_u, first + j]
                        ddt[j] = 0
                        from_state[j] = 0
                    for n in range(states):
                        b, c = B[image, p, k, n], C[image, p, k, n]
                        for j in range(WIDTH):
                            g = carried[block, n, j] + c * dy[j]
                            lanes_c[t, n, j] += h[t + 1, n, j] * dy[j]
                            lanes_b[t, n, j] += g * dx[j]
                            from_state[j] += g * b
                            back = g * decays[t, n, j]
                            flow = back * h[t, n, j]
                            ddt[j] += flow * A[k, n, first + j]
                            sums_a[block, n, j] += flow * dts[t, j]
                            carried[block, n, j] = back
                    for j in range(WIDTH):
                        x = u[image, p, own_u, first + j]
                        # A is times log2(e), so that its sum is, too.
                        change = (ddt[j] / log2_e + x * from_state[j]) * slopes[t, j]
                        ddelta[image, p, k, first + j] = change
                        dx[j] = dts[t, j] * from_state[j]
                        ddt[j] = change
                    if bias.shape[0] > 0:
                        for j in range(WIDTH):
                            dbias[image, k, first + j] += ddt[j]
                    if skip.shape[0] > 0:
                        for j in range(WIDTH):
                            dskip[image, k, first + j] += dy[j] * u[image, p, own_u, first + j]
                            dx[j] += dy[j] * skip[k, first + j]
                    if k > 0 and own_u == 0:
                        for j in range(WIDTH):
                            du[image, p, own_u, first + j] += dx[j]
                    else:
                        for j in range(WIDTH):
                            du[image, p, own_u, first + j] = dx[j]
            for t in range(steps):
                p = index[k, start + t]
                for n in range(states):
                    sum_b, sum_c = dtype.type(0), dtype.type(0)
                    for j in range(WIDTH):
                        sum_b += lanes_b[t, n, j]
                        sum_c += lanes_c[t, n, j]
                    dB[group, image, p, k, n] = sum_b
                    dC[group, image, p, k, n] = sum_c
        for block in range(end - begin):
            first = (begin + block) * WIDTH
            for n in range(states):
                for j in range(WIDTH):
                    dA[image, k, n, first + j] = sums_a[block, n, j]

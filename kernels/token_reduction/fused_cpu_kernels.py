"""Token reduction in Numba, for CPUs: pooling and its gradient, softmax and its columns.

A call takes the images, or the heads of images, from `begin` to `end`. Numba compiles the kernels at the first call.
Arrays are contiguous; an array of images without elements stands for None. Indices from outside are checked, because a
compiled kernel does not check them: `pool` and `spread` return whether all groups exist.

Source: MCTF, arXiv 2403.10030, section 3.2.
"""

import numpy as np

from terrazzo.kernels.numba_host.fused_compile import jit, jit_sum
from terrazzo.kernels.numba_host.fused_maths import exp, highest
from terrazzo.kernels.token_reduction.fused_cpu import ROWS, WIDTH


@jit_sum
def total_of(row):
    total = row.dtype.type(0)
    for c in range(len(row)):
        total += row[c]
    return total


@jit
def share(weight, total, tiny):
    """A token's part of its group's weight; 0 if the group has no weight (padding)."""
    return weight / (tiny if total < tiny else total)


@jit
def are_groups(groups, count):
    """Whether all numbers are at least 0 and below `count`."""
    right = True
    for t in range(len(groups)):
        right &= (groups[t] >= 0) & (groups[t] < count)
    return right


@jit
def pool(x, groups, weight, size, out, sizes, total, begin, end, first, last):
    """Weighted means of groups, and the sums of sizes and weights, in the order of the tokens.

    Args:
        x: (B, N, C); channels from `first` to `last` are pooled, and the call that begins with channel 0 adds up sizes.
        groups, weight, size: (B, N).
        out: (B, M, C). sizes, total: (B, M).
    """
    tokens, count, tiny = x.shape[1], out.shape[1], np.finfo(x.dtype).tiny
    own, begun = np.empty(count, x.dtype), np.empty(count, np.bool_)
    for image in range(begin, end):
        if not are_groups(groups[image], count):
            return False
        own[:] = 0
        begun[:] = False
        for t in range(tokens):
            own[groups[image, t]] += weight[image, t]
        if first == 0:
            sizes[image] = 0
            total[image] = own
            for t in range(tokens):
                sizes[image, groups[image, t]] += size[image, t]
        for t in range(tokens):
            g = groups[image, t]
            part = share(weight[image, t], own[g], tiny)
            row, mean = x[image, t, first:last], out[image, g, first:last]
            if begun[g]:
                for c in range(len(row)):
                    mean[c] += row[c] * part
            else:
                for c in range(len(row)):
                    mean[c] = row[c] * part
                begun[g] = True
        for g in range(count):
            if not begun[g]:
                out[image, g, first:last] = 0
    return True


@jit
def spread(grad, groups, weight, total, out, begin, end, first, last):
    """Give tokens their parts of their groups' gradients: (B, M, C) to (B, N, C)."""
    tiny = np.finfo(grad.dtype).tiny
    for image in range(begin, end):
        if not are_groups(groups[image], grad.shape[1]):
            return False
        for t in range(out.shape[1]):
            g = groups[image, t]
            part = share(weight[image, t], total[image, g], tiny)
            mean, row = grad[image, g, first:last], out[image, t, first:last]
            for c in range(len(mean)):
                row[c] = mean[c] * part
    return True


@jit
def softmax(scores, bias, scale, sums, begin, end):
    """Softmax over keys in place, and the sum of each key's weights over the queries of a head.

    Args:
        scores: (B, H, queries, keys), products of queries and keys. begin, end: heads, counted over all images.
        bias: (B, keys), added to the scaled scores, or (0, keys).
        sums: (B, H, keys).
    """
    heads, queries, keys = scores.shape[1:]
    dtype = scores.dtype
    scale, one = dtype.type(scale), dtype.type(1)
    own, part = np.zeros(keys, dtype), np.empty(keys, dtype)
    buffer = np.empty((keys + WIDTH - 1) // WIDTH * WIDTH, dtype)  # without a last part that is no whole vector
    for number in range(begin, end):
        image, head = number // heads, number % heads
        if len(bias) > 0:
            own[:] = bias[image]
        sums[image, head] = 0
        for start in range(0, queries, ROWS):
            # Sums of few rows are added up, so that a sum's error does not grow with the number of queries.
            part[:] = 0
            for q in range(start, min(start + ROWS, queries)):
                row = scores[image, head, q]
                for k in range(keys):
                    buffer[k] = row[k] * scale + own[k]
                buffer[keys:] = -np.inf
                high = highest(buffer)
                for k in range(len(buffer)):
                    buffer[k] = exp(buffer[k] - high)
                inverse = one / total_of(buffer)
                for k in range(keys):
                    weight = buffer[k] * inverse
                    row[k] = weight
                    part[k] += weight
            for k in range(keys):
                sums[image, head, k] += part[k]

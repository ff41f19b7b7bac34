"""Token reduction in Numba, for CPUs: plans from products of tokens, pooling and its gradient, softmax and its columns.

A call takes the images, or the heads of images, from `begin` to `end`. Numba compiles the kernels at the first call.
Arrays are contiguous; an array of images without elements stands for None. Indices from outside are checked, because a
compiled kernel does not check them: `pool` and `spread` return whether all groups exist.

Source: MCTF, arXiv 2403.10030, section 3.2.
"""

import numpy as np

from terrazzo.kernels.numba_host.fused_compile import jit, jit_sum
from terrazzo.kernels.numba_host.fused_maths import exp, highest
from terrazzo.kernels.token_reduction.fused_cpu import ROWS, WIDTH

SHORTEST = 1e-12  # the least norm that a token is divided by, as in F.normalize


@jit
def source_or_target(position, protect, rows, columns):
    """Whether a token behind the protected tokens is a destination; columns are 0 for even and odd tokens."""
    if columns == 0:
        return (position + protect) % 2 == 1
    row, column = position // columns, position % columns
    return row < rows // 2 * 2 and column < columns // 2 * 2 and row % 2 == 0 and column % 2 == 0


@jit
def list_tokens(sources, protect, rows, columns, listed):
    """Positions of the sources, then of the destinations, both ascending."""
    source, target = 0, sources
    for i in range(len(listed)):
        if source_or_target(i, protect, rows, columns):
            listed[target] = protect + i
            target += 1
        else:
            listed[source] = protect + i
            source += 1


@jit_sum
def square(row):
    """The sum of squares."""
    total = row.dtype.type(0)
    for c in range(len(row)):
        total += row[c] * row[c]
    return total


@jit_sum
def total_of(row):
    total = row.dtype.type(0)
    for c in range(len(row)):
        total += row[c]
    return total


@jit
def weaken(values, exponent, factor):
    """Multiply an image's factors by (1 / values)^exponent, scaled so that the largest is 1; 0 for values of 0."""
    zero, one = factor.dtype.type(0), factor.dtype.type(1)
    largest = zero
    for i in range(len(values)):
        inverse = one / values[i] if values[i] > zero else zero
        largest = inverse if inverse > largest else largest
    exponent = factor.dtype.type(exponent)
    for i in range(len(values)):
        inverse = one / values[i] if values[i] > zero else zero
        factor[i] *= (inverse / largest) ** exponent


@jit
def attract(row, scale, others, exponent):
    """In the place of products of tokens: ((cos + 1) / 2)^exponent, or 1 if the exponent is 0."""
    zero, one, half = row.dtype.type(0), row.dtype.type(1), row.dtype.type(0.5)
    if exponent == 0:
        row[:] = one
        return
    for j in range(len(row)):
        near = (row[j] * (scale * others[j]) + one) * half
        row[j] = zero if near < zero else near
    if exponent != 1:
        power = row.dtype.type(exponent)
        for j in range(len(row)):
            row[j] = row[j] ** power


@jit
def ranks(score, rank):
    """Each score's place in descending order; among equals, the lowest index comes first."""
    for i in range(len(score)):
        own, before = score[i], 0
        earlier, later = score[:i], score[i + 1 :]
        for j in range(len(earlier)):
            before += earlier[j] >= own
        for j in range(len(later)):
            before += later[j] > own
        rank[i] = before


@jit
def plan(
    metric,
    weight,
    size,
    importance,
    protect,
    rows,
    columns,
    merged,
    forward,
    exponents,
    two_way,
    found,
    begin,
    end,
):
    """Maps of images, (B, N).

    Args:
        weight: (B, sources, destinations), products of the tokens, which are replaced by attractions. What is not a
            number attracts most, as PyTorch's sort and maximum have it.
        size, importance: (B, N), or (0, N) for None.
        rows, columns: of the grid; 0 for even and odd tokens.
        merged, forward: r, and the sources among the merged tokens.
        exponents: of similarity, importance and size; 0 leaves a criterion out.
    """
    dtype, count = weight.dtype, metric.shape[1]
    sources, targets = weight.shape[1], weight.shape[2]
    zero, one, shortest = dtype.type(0), dtype.type(1), dtype.type(SHORTEST)
    infinity, padding = dtype.type(np.inf), dtype.type(-1)
    listed = np.empty(count - protect, np.int64)
    list_tokens(sources, protect, rows, columns, listed)
    inverse, factor, own = np.empty(count - protect, dtype), np.empty(count, dtype), np.empty(count - protect, dtype)
    alive = np.empty(count - protect, np.bool_)
    best, into, rank = np.empty(sources, dtype), np.empty(sources, np.int64), np.empty(sources, np.int64)
    back_best, back, back_rank = np.empty(targets, dtype), np.empty(targets, np.int32), np.empty(targets, np.int64)
    staying, of_targets = np.empty(sources, np.int64), np.empty(targets, np.int64)
    for image in range(begin, end):
        factor[:] = 1
        if len(importance) > 0 and exponents[1] != 0:
            weaken(importance[image], exponents[1], factor)
        if len(size) > 0 and exponents[2] != 0:
            weaken(size[image], exponents[2], factor)
        for i in range(count - protect):
            norm = np.sqrt(square(metric[image, listed[i]]))
            inverse[i] = one / (shortest if norm < shortest else norm)
            own[i] = factor[listed[i]]
            alive[i] = len(size) == 0 or size[image, listed[i]] > zero
        factors, living = own[sources:], alive[sources:]
        for i in range(sources):
            row, f = weight[image, i], own[i]
            attract(row, inverse[i], inverse[sources:], exponents[0])
            for j in range(targets):
                w = row[j] * f * factors[j]
                row[j] = w if w == w else infinity
            if not alive[i]:
                row[:] = padding
            elif len(size) > 0:
                for j in range(targets):
                    row[j] = row[j] if living[j] else padding
            best[i], into[i] = highest(row), 0
            while row[into[i]] != best[i]:
                into[i] += 1
        ranks(best, rank)
        stay = protect
        for i in range(sources):
            staying[i] = stay
            stay += rank[i] >= forward
        if two_way:
            back_best[:] = -2
            back[:] = 0
            for i in range(sources):
                if rank[i] >= forward:
                    row = weight[image, i]
                    for j in range(targets):
                        better = row[j] > back_best[j]
                        back_best[j] = row[j] if better else back_best[j]
                        back[j] = i if better else back[j]
            ranks(back_best, back_rank)
            for j in range(targets):
                follows = back_rank[j] < merged - forward
                of_targets[j] = staying[back[j]] if follows else protect + sources - merged + back_rank[j]
        else:
            for j in range(targets):
                of_targets[j] = protect + sources - merged + j
        for i in range(protect):
            found[image, i] = i
        for i in range(sources):
            found[image, listed[i]] = of_targets[into[i]] if rank[i] < forward else staying[i]
        for j in range(targets):
            found[image, listed[sources + j]] = of_targets[j]


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

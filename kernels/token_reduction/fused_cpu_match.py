"""Plans in Numba, for CPUs, from products of tokens: which tokens are merged, and into which.

`plan` takes the images from `begin` to `end`, with all products of an image. An image with too many of them for the
memory goes through the other kernels, some sources at a time (fused_cpu_plan.py). Arrays are contiguous; an array of
images without elements stands for None.

Source: MCTF, arXiv 2403.10030, section 3.2.
"""

import numpy as np

from terrazzo.kernels.numba_host.fused_compile import jit, jit_sum
from terrazzo.kernels.numba_host.fused_maths import highest

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
def prepare(
    image, metric, size, importance, sources, protect, rows, columns, exponents, listed, inverse, factor, alive
):
    """List an image's tokens behind the protected tokens, sources first, and what each of them brings to attractions.

    Args:
        metric: (B, N, C). size, importance: (B, N), or (0, N) for None.
        rows, columns: of the grid; 0 for even and odd tokens.
        exponents: of similarity, importance and size; 0 leaves a criterion out.
        listed: positions of the tokens.
        inverse: 1 / norms. factor: by importance and size. alive: whether a token is none of the padding.
    """
    zero, one, shortest = factor.dtype.type(0), factor.dtype.type(1), factor.dtype.type(SHORTEST)
    list_tokens(sources, protect, rows, columns, listed)
    every = np.ones(metric.shape[1], factor.dtype)
    if len(importance) > 0 and exponents[1] != 0:
        weaken(importance[image], exponents[1], every)
    if len(size) > 0 and exponents[2] != 0:
        weaken(size[image], exponents[2], every)
    for i in range(len(listed)):
        norm = np.sqrt(square(metric[image, listed[i]]))
        inverse[i] = one / (shortest if norm < shortest else norm)
        factor[i] = every[listed[i]]
        alive[i] = len(size) == 0 or size[image, listed[i]] > zero


@jit
def draw(weight, numbers, sources, inverse, factor, alive, exponent, begin, end):
    """Replace products of sources with all destinations by attractions.

    What is not a number attracts most, as PyTorch's sort and maximum have it; padding attracts least.

    Args:
        weight: (rows, destinations). numbers: the sources of the rows.
        inverse, factor, alive: as in `prepare`.
        exponent: of similarity.
        begin, end: the rows of this call.
    """
    infinity, padding = weight.dtype.type(np.inf), weight.dtype.type(-1)
    factors, living = factor[sources:], alive[sources:]
    for t in range(begin, end):
        i, row = numbers[t], weight[t]
        own = factor[i]
        attract(row, inverse[i], inverse[sources:], exponent)
        if not alive[i]:
            row[:] = padding
            continue
        for j in range(len(row)):
            w = row[j] * own * factors[j]
            row[j] = w if w == w else infinity
        for j in range(len(row)):
            row[j] = row[j] if living[j] else padding


@jit
def choose_targets(weight, numbers, sources, inverse, factor, alive, exponent, best, into, begin, end):
    """`draw`, and the largest attraction of each source with its destination; among equals, the first."""
    for t in range(begin, end):
        draw(weight, numbers, sources, inverse, factor, alive, exponent, t, t + 1)
        i, row = numbers[t], weight[t]
        best[i], into[i] = highest(row), 0
        while row[into[i]] != best[i]:
            into[i] += 1


@jit
def choose_sources(weight, numbers, rank, forward, best, into, first, last):
    """The largest attraction of the destinations from `first` to `last` so far, and its source, which must stay."""
    for t in range(len(numbers)):
        i = numbers[t]
        if rank[i] >= forward:
            row, most, chosen = weight[t, first:last], best[first:last], into[first:last]
            for j in range(len(row)):
                better = row[j] > most[j]
                most[j] = row[j] if better else most[j]
                chosen[j] = i if better else chosen[j]


@jit
def stay(best, forward, protect, rank, staying):
    """Ranks of the sources, of which the first `forward` are merged, and new places of the sources that stay."""
    ranks(best, rank)
    place = protect
    for i in range(len(rank)):
        staying[i] = place
        place += rank[i] >= forward


@jit
def write(listed, protect, merged, forward, into, rank, staying, back_best, back, two_way, found):
    """The map of an image, (N,).

    Args:
        merged, forward: r, and the sources among the merged tokens.
        into, rank, staying: the choice of each source, its rank, and its place if it stays.
        back_best, back: the choice of each destination, if the plan is `two_way`.
    """
    sources, targets = len(into), len(back)
    of_targets = np.empty(targets, np.int64)
    behind = protect + sources - merged
    if two_way:
        back_rank = np.empty(targets, np.int64)
        ranks(back_best, back_rank)
        for j in range(targets):
            follows = back_rank[j] < merged - forward
            of_targets[j] = staying[back[j]] if follows else behind + back_rank[j]
    else:
        for j in range(targets):
            of_targets[j] = behind + j
    for i in range(protect):
        found[i] = i
    for i in range(sources):
        found[listed[i]] = of_targets[into[i]] if rank[i] < forward else staying[i]
    for j in range(targets):
        found[listed[sources + j]] = of_targets[j]


@jit
def plan(
    metric,
    size,
    importance,
    weight,
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
        weight: (B, sources, destinations), products of the tokens, which are replaced by attractions.
        The others are as in `prepare` and `write`.
    """
    dtype, count = weight.dtype, metric.shape[1]
    sources, targets = weight.shape[1], weight.shape[2]
    listed, numbers = np.empty(count - protect, np.int64), np.arange(sources)
    inverse, factor = np.empty(count - protect, dtype), np.empty(count - protect, dtype)
    alive = np.empty(count - protect, np.bool_)
    best, into = np.empty(sources, dtype), np.empty(sources, np.int64)
    rank, staying = np.empty(sources, np.int64), np.empty(sources, np.int64)
    back_best, back = np.empty(targets, dtype), np.empty(targets, np.int32)
    for image in range(begin, end):
        prepare(
            image, metric, size, importance, sources, protect, rows, columns, exponents, listed, inverse, factor, alive
        )
        given = (numbers, sources, inverse, factor, alive, exponents[0])
        choose_targets(weight[image], *given, best, into, 0, sources)
        stay(best, forward, protect, rank, staying)
        if two_way:
            back_best[:] = -2
            back[:] = 0
            choose_sources(weight[image], numbers, rank, forward, back_best, back, 0, targets)
        write(listed, protect, merged, forward, into, rank, staying, back_best, back, two_way, found[image])

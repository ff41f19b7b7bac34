"""Triton kernels of a plan: each token's best partner, ranks by counting, and the map.

A program owns some tokens of one image and compares them with the others, a tile at a time; no tensor of all pairs is
stored. Among equals, the lowest index comes first: within a tile the smallest index is taken, and between tiles only a
larger value replaces the best.

Source: MCTF, arXiv 2403.10030, section 3.2. Names: pointers `p_`, blocks `b_`, offsets `o_`. Addresses are 64-bit.
"""

import triton
import triton.language as tl

from terrazzo.kernels.triton_host.fused_tiles import product

# Numbers of tokens change from block to block of a model, grids from image to image.
_ANY = ["count", "sources", "targets", "protect", "rows", "columns", "forward", "merged", "tiles"]


@triton.jit
def source_at(o_number, protect, rows, columns, CELLS: tl.constexpr):
    """Positions of sources in the sequence, in the order of `partition.order`."""
    if not CELLS:
        return protect + protect % 2 + 2 * o_number
    # In a pair of grid rows, the upper row has sources beside destinations, and the lower row has only sources. A last
    # odd row has only sources, too.
    upper = columns - columns // 2
    pair = o_number // (upper + columns)
    rest = o_number % (upper + columns)
    b_whole = pair >= rows // 2
    b_beside = (rest < upper) & (pair < rows // 2)
    row = 2 * pair + tl.where(b_beside | b_whole, 0, 1)
    column = tl.where(b_beside, tl.minimum(2 * rest + 1, columns - 1), tl.where(b_whole, rest, rest - upper))
    return protect + row * columns + column


@triton.jit
def target_at(o_number, protect, columns, CELLS: tl.constexpr):
    """Positions of destinations in the sequence."""
    if not CELLS:
        return protect + 1 - protect % 2 + 2 * o_number
    across = columns // 2
    return protect + 2 * (o_number // across) * columns + 2 * (o_number % across)


@triton.jit
def load_part(p_base, o_rows, b_real, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load BLOCK_D channels of rows from channel `first` on, zero past the last."""
    o_d = first + tl.arange(0, BLOCK_D)
    return tl.load(
        p_base + o_rows[:, None] * DIM + o_d[None, :], mask=b_real[:, None] & (o_d < DIM)[None, :], other=0.0
    )


@triton.jit
def inverse_norm(p_norm, o_rows, b_real):
    return 1 / tl.maximum(tl.load(p_norm + o_rows, mask=b_real, other=1.0), 1e-12)


@triton.jit
def similarity(b_cosine, exponent, POWER: tl.constexpr):
    """((cos + 1) / 2)^exponent; without the similarity if POWER is 0, without the exponent if POWER is 1."""
    if POWER == 0:
        return tl.full(b_cosine.shape, 1.0, tl.float32)
    b_half = tl.maximum((b_cosine + 1) / 2, 0.0)
    if POWER == 1:
        return b_half
    return tl.exp2(tl.log2(b_half) * exponent)


@triton.jit(do_not_specialize=_ANY)
def match(
    p_metric,
    p_norm,
    p_factor,
    p_rank,
    p_best,
    p_into,
    count,
    sources,
    targets,
    protect,
    rows,
    columns,
    forward,
    tiles,
    exponent,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    CELLS: tl.constexpr,
    POWER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The best destination of BLOCK sources of one image, and its attraction.

    With BACKWARD, the best source of BLOCK destinations, among the sources that stay (rank at least `forward`). Padding
    has a factor below 0.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_own = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    if BACKWARD:
        owners = targets
        others = sources
        at = target_at(o_own, protect, columns, CELLS)
    else:
        owners = sources
        others = targets
        at = source_at(o_own, protect, rows, columns, CELLS)
    b_own = o_own < owners
    p_metric += image * count * DIM
    p_norm += image * count
    b_inverse = inverse_norm(p_norm, at, b_own)
    if HAS_FACTOR:
        p_factor += image * count
        b_factor = tl.load(p_factor + at, mask=b_own, other=-1.0)

    b_best = tl.full([BLOCK], -4.0, tl.float32)
    b_into = tl.zeros([BLOCK], tl.int32)
    for first in range(0, others, BLOCK_OTHER):
        o_other = first + tl.arange(0, BLOCK_OTHER)
        b_real = o_other < others
        if BACKWARD:
            other_at = source_at(o_other, protect, rows, columns, CELLS)
        else:
            other_at = target_at(o_other, protect, columns, CELLS)
        b_cosine = tl.zeros([BLOCK, BLOCK_OTHER], tl.float32)
        if POWER != 0:
            for part in range(0, DIM, BLOCK_D):
                b_left = load_part(p_metric, at, b_own, part, DIM, BLOCK_D)
                b_right = load_part(p_metric, other_at, b_real, part, DIM, BLOCK_D)
                b_cosine = product(b_left, tl.trans(b_right), b_cosine, PRECISION, INTERPRETED)
        b_cosine = b_cosine * b_inverse[:, None] * inverse_norm(p_norm, other_at, b_real)[None, :]
        b_weight = similarity(b_cosine, exponent, POWER)
        if HAS_FACTOR:
            b_other_factor = tl.load(p_factor + other_at, mask=b_real, other=-1.0)
            b_live = (b_factor >= 0)[:, None] & (b_other_factor >= 0)[None, :]
            b_weight = tl.where(b_live, b_weight * b_factor[:, None] * b_other_factor[None, :], -1.0)
        if BACKWARD:
            b_rank = tl.load(p_rank + image * sources + o_other, mask=b_real, other=0)
            b_weight = tl.where((b_rank >= forward)[None, :], b_weight, -2.0)
        b_weight = tl.where(b_real[None, :], b_weight, -3.0)
        b_high = tl.max(b_weight, 1)
        b_first = tl.min(tl.where(b_weight == b_high[:, None], o_other[None, :], others), 1)
        b_better = b_high > b_best  # false for NaN, so the index is always a token's
        b_into = tl.where(b_better, b_first, b_into)
        b_best = tl.where(b_better, b_high, b_best)
    tl.store(p_best + image * owners + o_own, b_best, mask=b_own)
    tl.store(p_into + image * owners + o_own, b_into, mask=b_own)


@triton.jit(do_not_specialize=_ANY)
def ranks(p_score, p_rank, count, tiles, BLOCK: tl.constexpr):
    """(B, count) to each score's place in descending order: the number of scores before it."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_own = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    p_score += image * count
    b_own = tl.load(p_score + o_own, mask=o_own < count, other=0.0)
    b_rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        o_other = first + tl.arange(0, BLOCK)
        b_other = tl.load(p_score + o_other, mask=o_other < count, other=float("-inf"))
        b_tie = (b_other[None, :] == b_own[:, None]) & (o_other[None, :] < o_own[:, None])
        b_rank += tl.sum(((b_other[None, :] > b_own[:, None]) | b_tie).to(tl.int32), 1)
    tl.store(p_rank + image * count + o_own, b_rank, mask=o_own < count)


@triton.jit(do_not_specialize=_ANY)
def assign(
    p_rank,
    p_into,
    p_back_rank,
    p_back,
    p_map,
    count,
    sources,
    targets,
    protect,
    rows,
    columns,
    forward,
    merged,
    tiles,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The map of BLOCK tokens of one image, listed as protected tokens, sources, destinations.

    The sources that stay keep their order. A merged token gets the place of the token that it is merged into. `merged`
    is r, `forward` the number of sources among the merged tokens.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_own = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    p_rank += image * sources
    o_source = o_own - protect
    b_source = (o_source >= 0) & (o_source < sources)
    b_rank = tl.load(p_rank + o_source, mask=b_source, other=0)
    b_gone = b_source & (b_rank < forward)
    b_into = tl.load(p_into + image * sources + o_source, mask=b_gone, other=0)
    o_target = tl.where(b_gone, b_into, o_source - sources)
    b_target = b_gone | ((o_source >= sources) & (o_own < count))
    b_behind = o_target
    b_follows = b_source & (b_rank >= forward)
    o_follows = o_source
    if BACKWARD:
        b_behind = tl.load(p_back_rank + image * targets + o_target, mask=b_target, other=0)
        b_also = b_target & (b_behind < merged - forward)
        o_follows = tl.where(b_also, tl.load(p_back + image * targets + o_target, mask=b_also, other=0), o_follows)
        b_follows = b_follows | b_also

    b_stay = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sources, BLOCK):
        o_other = first + tl.arange(0, BLOCK)
        b_stays = (o_other < sources) & (tl.load(p_rank + o_other, mask=o_other < sources, other=0) >= forward)
        b_stay += tl.sum((b_stays[None, :] & (o_other[None, :] < o_follows[:, None])).to(tl.int32), 1)
    b_map = tl.where(b_follows, protect + b_stay, protect + sources - merged + b_behind)
    b_map = tl.where(o_own < protect, o_own, b_map)
    at = tl.where(b_source, source_at(o_source, protect, rows, columns, CELLS), o_own)
    o_listed = o_source - sources
    at = tl.where((o_listed >= 0) & (o_own < count), target_at(o_listed, protect, columns, CELLS), at)
    tl.store(p_map + image * count + at, b_map.to(tl.int64), mask=o_own < count)

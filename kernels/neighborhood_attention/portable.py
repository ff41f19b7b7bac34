"""Neighborhood attention in standard PyTorch operations: the forward and the backward pass on real tensors.

In the forward pass, tiles are strided views. Residue classes, tiles and halos are all axes of one view of the map in
memory (a packed qkv included). So each kind of tile (tiling.py) costs one copy of its queries, keys and values, and one
more copy puts its result in place. Tiles are computed piece by piece, so extra memory does not grow with the map.

In the backward pass, tiles are gathered by index tables (tables.py) and the weights are recomputed tile by tile, so
only the inputs are kept.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from terrazzo.kernels.neighborhood_attention.tables import Eager, Tiles, additive, fold, in_order, unfold
from terrazzo.kernels.neighborhood_attention.tiling import Fold, Kind, folds, kinds

# The most weights that fit into two cores' caches, where plain products win. For more, attention that never stores them
# is faster.
_CACHED = 1 << 19
# Elements of keys copied at once. Larger copies allocate fresh memory each time, which costs more than the arithmetic.
_PIECE = 1 << 18
# Weights alive at once in the backward pass: about as many as two cores' caches hold (README.md).
_CHUNK = 1 << 19


@dataclass(frozen=True)
class _Side:
    """Queries or keys of one kind of tile along an axis, in positions of the map.

    Attributes:
        first: The first position.
        tiles, tile_step: The number of tiles, and the distance between neighbouring tiles.
        length: Positions in a tile; neighbours are a dilation apart.
    """

    first: int
    tiles: int
    tile_step: int
    length: int


@dataclass(frozen=True)
class _Axis:
    """One axis of one kind of tile, for all residue classes of one length. The classes are one position apart."""

    classes: int
    dilation: int
    queries: _Side
    keys: _Side


@dataclass(frozen=True)
class _Call:
    """One kind of tile: both axes, and each pair's index into the bias (past its end if the key is outside)."""

    rows: _Axis
    columns: _Axis
    bias: torch.Tensor | None  # (M * N,); None where no bias is given and every key is inside

    @property
    def query_count(self) -> int:
        return self.rows.queries.length * self.columns.queries.length

    @property
    def key_count(self) -> int:
        return self.rows.keys.length * self.columns.keys.length


def _axis(fold: Fold, kind: Kind, dilation: int) -> _Axis:
    def side(firsts: list[int], length: int) -> _Side:
        step = firsts[1] - firsts[0] if len(firsts) > 1 else 0
        return _Side(fold.first + firsts[0] * dilation, len(firsts), step * dilation, length)

    queries = side([tile[0] for tile in kind.queries], sum(kind.real[0]))
    return _Axis(fold.classes, dilation, queries, side(list(kind.keys), kind.halo))


def _indices(kind: Kind, kernel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Along an axis, for each query and key: whether the key is in the window, and key minus query plus kernel - 1."""
    length = sum(kind.real[0])  # without the repeats that fill a last tile for the index tables
    start = torch.tensor(kind.start[:length])[:, None]
    slot = torch.arange(kind.halo)[None]
    offset = torch.tensor(kind.offset[:length])[:, None] + slot + kernel - 1
    return (slot >= start) & (slot < start + kernel), offset


@lru_cache(maxsize=128)
def _plan(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], biased: bool, device: torch.device
) -> tuple[_Call, ...]:
    calls = []
    last = (2 * kernel[0] - 1) * (2 * kernel[1] - 1) if biased else 1
    for fold_h in folds(size[0], dilation[0]):
        for fold_w in folds(size[1], dilation[1]):
            for kind_h in kinds(fold_h.members, kernel[0]):
                for kind_w in kinds(fold_w.members, kernel[1]):
                    inside_h, offset_h = _indices(kind_h, kernel[0])
                    inside_w, offset_w = _indices(kind_w, kernel[1])
                    inside = inside_h[:, None, :, None] & inside_w[None, :, None, :]
                    index = None
                    if biased or not inside.all():
                        offset = offset_h[:, None, :, None] * (2 * kernel[1] - 1) + offset_w[None, :, None, :]
                        index = torch.where(inside, offset if biased else 0, last).flatten().to(device)
                    rows, columns = _axis(fold_h, kind_h, dilation[0]), _axis(fold_w, kind_w, dilation[1])
                    calls.append(_Call(rows, columns, index))
    return tuple(calls)


def _view(x: torch.Tensor, call: _Call, side: str) -> torch.Tensor:
    """View (B, H, W, heads, D) as (heads, B, classes_h, classes_w, tiles_h, tiles_w, tile_h, tile_w, D)."""
    batch, _, _, heads, dim = x.shape
    step_b, step_h, step_w, step_n, step_d = x.stride()
    rows, columns = getattr(call.rows, side), getattr(call.columns, side)
    return x.as_strided(
        (heads, batch, call.rows.classes, call.columns.classes, rows.tiles, columns.tiles)
        + (rows.length, columns.length, dim),
        (step_n, step_b, step_h, step_w, rows.tile_step * step_h, columns.tile_step * step_w)
        + (call.rows.dilation * step_h, call.columns.dilation * step_w, step_d),
        x.storage_offset() + rows.first * step_h + columns.first * step_w,
    )


def _bias_table(rpb: torch.Tensor | None, heads: int, like: torch.Tensor) -> torch.Tensor:
    """(heads, entries + 1): the bias, or a single zero without a bias, and -inf at the end for keys outside."""
    table = like.new_zeros(heads, 1) if rpb is None else rpb.flatten(1).to(like.dtype)
    return F.pad(table, (0, 1), value=float("-inf"))


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention on a map; arguments and result as in `reference.neighborhood_attention`."""
    heads, dim = query.shape[3:]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    table = _bias_table(rpb, heads, query)
    for call in _plan(tuple(query.shape[1:3]), kernel_size, dilation, rpb is not None, query.device):
        shape = (-1, call.query_count, call.key_count)
        bias = None
        if call.bias is not None:
            bias = table.gather(1, call.bias.expand(heads, -1)).view(heads, *shape)
        tiles_q, tiles_k, tiles_v = _view(query, call, "queries"), _view(key, call, "keys"), _view(value, call, "keys")
        places = _view(out, call, "queries")
        for piece in _pieces(tiles_k.shape):
            place = places[piece]
            tile_q = tiles_q[piece].reshape(len(place), -1, shape[1], dim)
            tile_k, tile_v = (x[piece].reshape(len(place), -1, shape[2], dim) for x in (tiles_k, tiles_v))
            attend = _cached if _stays_cached(tile_q, shape[2]) else F.scaled_dot_product_attention
            result = attend(tile_q, tile_k, tile_v, None if bias is None else bias[piece[0]], scale=scale)
            place.copy_(result.view(place.shape))
    return out


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, ...]]:
    """Slices of the 6 leading axes (heads, images, classes, tiles); a piece has `_PIECE` elements, or is one tile."""
    for axis in range(6):
        rest = math.prod(shape[axis + 1 :])
        if rest <= _PIECE or axis == 5:
            break
    step = max(1, _PIECE // max(rest, 1))
    for outer in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(first, min(first + step, shape[axis])))


def _stays_cached(tile_q: torch.Tensor, key_count: int) -> bool:
    """Whether plain products are faster. Never for half precision, which PyTorch's attention sums in float32."""
    return tile_q[..., 0].numel() * key_count <= _CACHED and tile_q.dtype in (torch.float32, torch.float64)


def _cached(query, key, value, bias, scale):
    """Attention by plain products: (heads, P, M, D), (heads, P, N, D) and a bias (heads, 1, M, N) or None."""
    heads, tiles, length, dim = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    if bias is not None and tiles == 1:
        weight = torch.baddbmm(bias[:, 0], query, key.transpose(1, 2), alpha=scale)
    else:
        weight = torch.bmm(query * scale, key.transpose(1, 2))
        if bias is not None:
            weight.view(heads, tiles, length, -1).add_(bias)
    return torch.bmm(weight.softmax(-1), value).view(heads, tiles, length, dim)


def _overlap_add(total: torch.Tensor, tiles: torch.Tensor, rows: tuple[int, ...], call: Tiles) -> None:
    """Add the halos of tiles (P, tiles_h, tiles_w, halo_h, halo_w, D) into their map (P, H, W, D), axis by axis.

    `rows` holds the first key of each row of tiles. (`add_`, since `a[i] += b` would also copy the sum onto itself.)
    """
    columns = call.columns
    if len(columns.keys) == 1:
        first = columns.keys[0]
        for number, top in enumerate(rows):
            total[:, top : top + call.rows.halo, first : first + columns.halo].add_(tiles[:, number, 0])
        return
    # Tiles of a kind lie side by side, so one addition adds a piece of one tile's length from all tiles.
    count, step, first = len(columns.keys), len(columns.start), columns.keys[0]
    pieces = -(-columns.halo // step)
    strips = tiles.new_zeros(*tiles.shape[:2], call.rows.halo, total.shape[2] + pieces * step, total.shape[3])
    region = strips[:, :, :, first : first + (count + pieces - 1) * step].unflatten(3, (-1, step))
    tiles = tiles.transpose(2, 3)  # P tiles_h halo_h tiles_w halo_w D
    for piece in range(pieces):
        part = tiles[..., piece * step : (piece + 1) * step, :]
        region[:, :, :, piece : piece + count, : part.shape[4]].add_(part)
    strips = strips[:, :, :, : total.shape[2]]
    for number, top in enumerate(rows):
        total[:, top : top + call.rows.halo].add_(strips[:, number])


def _parts(heads: int, batch: int, rows: int, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (heads, batch, rows of tiles) into contiguous parts of about `_CHUNK` weights; a row of tiles has `size`."""

    def steps(count: int, weights: int) -> Iterator[slice]:
        step = max(1, _CHUNK // weights)
        return (slice(first, min(first + step, count)) for first in range(0, count, step))

    if batch * rows * size <= _CHUNK:
        yield from ((part, slice(0, batch), slice(0, rows)) for part in steps(heads, batch * rows * size))
        return
    for head in range(heads):
        one = slice(head, head + 1)
        if rows * size <= _CHUNK:
            yield from ((one, part, slice(0, rows)) for part in steps(batch, rows * size))
        else:
            yield from ((one, slice(i, i + 1), part) for i in range(batch) for part in steps(rows, size))


def _call_backward(call, table, q, k, v, grad, grad_q, total_k, total_v):
    """Backward pass of one kind of tile: fill `grad_q`, add to the totals, return the gradient of `table`.

    Tiles are gathered, used and added back part by part, so that intermediate tensors stay in the caches.

    Args:
        q, k, v, grad: (heads, B, N, D).
        grad_q: (heads, B, tiles * M, D), in the order of the call's tiles.
        total_k, total_v: (heads, B, H, W, D).
    """
    heads, batch, _, dim = q.shape
    length, keys = call.query_count, call.key_count
    across = len(call.columns.keys)
    grad_table = q.new_zeros(heads, length, keys)
    for head, image, row in _parts(heads, batch, len(call.rows.keys), across * length * keys):
        own = slice(row.start * across * length, row.stop * across * length)

        def tiles(x, positions, size, head=head, image=image, row=row):
            x = x[head, image]
            if positions is not None:
                x = Eager.gather(x, positions[row.start * across * size : row.stop * across * size])
            return x.reshape(-1, size, dim)

        part_q, part_grad = tiles(q, call.queries, length), tiles(grad, call.queries, length)
        part_k, part_v = tiles(k, call.keys, keys), tiles(v, call.keys, keys)
        if call.real is not None:  # a repeated query must not count twice
            part_grad = (part_grad.view(-1, own.stop - own.start, dim) * call.real[own]).view_as(part_grad)
        weight = torch.bmm(part_q, part_k.transpose(1, 2))
        if table is not None:
            weight.view(head.stop - head.start, -1, length, keys).add_(table[head] if table.shape[0] > 1 else table)
        weight = weight.softmax(-1)
        grad_weight = torch.bmm(part_grad, part_v.transpose(1, 2))
        grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
        grad_q[head, image, own] = torch.bmm(grad_score, part_k).view(grad_q[head, image, own].shape)
        tops = call.rows.keys[row]
        shape = (-1, len(tops), across, call.rows.halo, call.columns.halo, dim)
        for total, part in (
            (total_k, torch.bmm(grad_score.transpose(1, 2), part_q)),
            (total_v, torch.bmm(weight.transpose(1, 2), part_grad)),
        ):
            _overlap_add(total[head, image].flatten(0, 1), part.view(shape), tops, call)
        grad_table[head].add_(grad_score.view(head.stop - head.start, -1, length, keys).sum(1))
    return grad_table


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `forward` with respect to query, key, value and rpb.

    Half-precision inputs are computed in float32 and rounded once at the end.
    """
    mode = Eager
    shape = query.shape
    heads, dim = shape[3:]
    folding = mode.folding(tuple(shape[1:3]), dilation, query.device)
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    grad_rpb = None if rpb is None else torch.zeros(rpb.flatten(1).shape, dtype=dtype, device=query.device)
    folded = [
        fold(x, dilation, folding, mode)
        for x in (query.to(dtype) * scale, key.to(dtype), value.to(dtype), grad.to(dtype))
    ]
    grads_q, grads_k, grads_v = [], [], []
    for q, k, v, g, members in zip(*folded, folding.members):
        plan = mode.plan(members, kernel_size, query.device)
        parts_q = []
        total_k, total_v = (q.new_zeros(heads, q.shape[1], *members, dim) for _ in "kv")
        for call in plan.calls:
            count = q.shape[2] if call.queries is None else call.queries.numel()
            grad_q = q.new_empty(heads, q.shape[1], count, dim)
            table = additive(rpb, call, q)
            grad_table = _call_backward(call, table, q, k, v, g, grad_q, total_k, total_v)
            if grad_rpb is not None:
                grad_rpb.scatter_add_(1, call.bias.expand(heads, -1), grad_table.view(heads, -1))
            parts_q.append(grad_q)
        grads_q.append(in_order(parts_q, q, plan, mode) * scale)
        grads_k.append(total_k.view(k.shape))
        grads_v.append(total_v.view(v.shape))
    unfolded = (
        unfold(groups, shape, dilation, folding, mode).to(query.dtype) for groups in (grads_q, grads_k, grads_v)
    )
    return *unfolded, None if rpb is None else grad_rpb.view(rpb.shape).to(rpb.dtype)

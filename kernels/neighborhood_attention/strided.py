"""The portable form's forward pass on real tensors: tiles are strided views, so nothing is copied that need not be.

Residue classes, tiles and halos are all steps of one view of the map as it lies in memory (a packed qkv included), so
each kind of tile (tiling.py) costs one copy of its queries, keys and values, and its result goes to its place with one
more. Tiles go piece by piece, so memory beside the result does not grow with the map. What portable.py traces for
export does the same with index tables.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from terrazzo.kernels.neighborhood_attention.tiling import Fold, Kind, folds, kinds

# Up to so many weights stay in two cores' caches and plain products win; beyond it, attention that never stores them.
_CACHED = 1 << 19
# Elements of keys copied at once: larger copies are fresh memory each time, which costs more than the arithmetic.
_PIECE = 1 << 18


@dataclass(frozen=True)
class _Side:
    """Queries or keys of one kind of tile along an axis, in positions of the map.

    Attributes:
        first: The first one.
        tiles, tile_step: How many tiles, and from one to the next.
        length: Positions in a tile; they are a dilation apart.
    """

    first: int
    tiles: int
    tile_step: int
    length: int


@dataclass(frozen=True)
class _Axis:
    """One axis of one kind of tile, for all residue classes of one length; these are one position apart."""

    classes: int
    dilation: int
    queries: _Side
    keys: _Side


@dataclass(frozen=True)
class _Call:
    """One kind of tile: both axes, and for each query and key the index into the bias, past its end if outside."""

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
    """Of an axis, for each query and key: whether the key is in the window, and key minus query plus kernel - 1."""
    length = sum(kind.real[0])  # repeats that fill a last tile for the traced form are left out
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
    """(B, H, W, heads, D) seen as (heads, B, classes and tiles of both axes (4 of them), tile_h, tile_w, D)."""
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
    """(heads, entries + 1): the bias, or a zero where there is none, and -inf at the end for keys outside."""
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
        additive = None
        if call.bias is not None:
            additive = table.gather(1, call.bias.expand(heads, -1)).view(heads, *shape)
        tiles_q, tiles_k, tiles_v = _view(query, call, "queries"), _view(key, call, "keys"), _view(value, call, "keys")
        places = _view(out, call, "queries")
        for piece in _pieces(tiles_k.shape):
            place = places[piece]
            tile_q = tiles_q[piece].reshape(len(place), -1, shape[1], dim)
            tile_k, tile_v = (x[piece].reshape(len(place), -1, shape[2], dim) for x in (tiles_k, tiles_v))
            attend = _cached if _stays_cached(tile_q, shape[2]) else F.scaled_dot_product_attention
            result = attend(tile_q, tile_k, tile_v, None if additive is None else additive[piece[0]], scale=scale)
            place.copy_(result.view(place.shape))
    return out


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, ...]]:
    """Slices of the leading axes (heads, images, classes, tiles: 6), each piece of `_PIECE` elements or one tile."""
    for axis in range(6):
        rest = math.prod(shape[axis + 1 :])
        if rest <= _PIECE or axis == 5:
            break
    step = max(1, _PIECE // max(rest, 1))
    for outer in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            yield (*(slice(i, i + 1) for i in outer), slice(first, min(first + step, shape[axis])))


def _stays_cached(tile_q: torch.Tensor, key_count: int) -> bool:
    """Half precision goes the other way, which sums in float32."""
    return tile_q[..., 0].numel() * key_count <= _CACHED and tile_q.dtype in (torch.float32, torch.float64)


def _cached(query, key, value, additive, scale):
    """Attention by plain products: (heads, P, M, D), (heads, P, N, D) and an additive (heads, 1, M, N) or None."""
    heads, tiles, length, dim = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    if additive is not None and tiles == 1:
        weight = torch.baddbmm(additive[:, 0], query, key.transpose(1, 2), alpha=scale)
    else:
        weight = torch.bmm(query * scale, key.transpose(1, 2))
        if additive is not None:
            weight.view(heads, tiles, length, -1).add_(additive)
    return torch.bmm(weight.softmax(-1), value).view(heads, tiles, length, dim)

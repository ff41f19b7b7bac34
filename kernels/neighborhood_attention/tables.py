"""Index tables of neighborhood attention, for the exported form and for the backward pass.

Residue classes are folded into the batch. Each class is cut into query tiles with a halo of keys (tiling.py). Each kind
of tile has an additive table that holds the bias, or -inf outside the window. If the map is kernel x dilation, a class
is one tile without a mask: plain dense attention.
(The forward pass on real tensors needs no tables; see portable.py.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from terrazzo.kernels.neighborhood_attention.tiling import Fold, Kind, folds, kinds


@dataclass(frozen=True)
class Tiles:
    """One kind of tile, as index tables over a class's flattened map of N positions.

    Attributes:
        rows, columns: The kinds of the two axes.
        queries: (tiles * M,) positions, or None if the class is one tile.
        real: (tiles * M, 1) 0 where a query is a repeat that only fills its tile, or None if no query is.
        keys: (tiles * N,) positions, or None if the class is one tile.
        outside: (M, N) True where a key is outside the window, or None if no key is.
        bias: (M * N,) index into the flattened bias table.
    """

    rows: Kind
    columns: Kind
    queries: torch.Tensor | None
    real: torch.Tensor | None
    keys: torch.Tensor | None
    outside: torch.Tensor | None
    bias: torch.Tensor

    @property
    def query_count(self) -> int:
        return len(self.rows.start) * len(self.columns.start)

    @property
    def key_count(self) -> int:
        return self.rows.halo * self.columns.halo


@dataclass(frozen=True)
class Plan:
    """All calls of a class's map, and where each position's query sits in their concatenation (None: in order)."""

    calls: tuple[Tiles, ...]
    order: torch.Tensor | None


def _outer(rows: torch.Tensor, columns: torch.Tensor, stride: int) -> torch.Tensor:
    """Flat indices of all pairs of (tiles, length) rows and columns: (tiles_h * tiles_w * length_h * length_w,)."""
    return (rows[:, None, :, None] * stride + columns[None, :, None, :]).flatten()


def _axis_tables(kind: Kind, kernel: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    start = torch.tensor(kind.start, device=device)[:, None]
    slot = torch.arange(kind.halo, device=device)[None]
    inside = (slot >= start) & (slot < start + kernel)
    bias = (torch.tensor(kind.offset, device=device)[:, None] + slot + kernel - 1).clamp(0, 2 * kernel - 2)
    queries = torch.tensor(kind.queries, device=device)
    keys = torch.tensor(kind.keys, device=device)[:, None] + slot
    return inside, bias, queries, keys


def _slots(axis: tuple[Kind, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per position of an axis: the kind that holds its query, the tile within the kind, the place in the tile."""
    tile = len(axis[0].start)
    homes = sorted((number, k, t) for k, kind in enumerate(axis) for t, number in enumerate(kind.tiles))
    count = sum(sum(map(sum, kind.real)) for kind in axis)
    home = torch.tensor(homes, device=device).repeat_interleave(tile, 0)[:count]
    return home[:, 1], home[:, 2], torch.arange(count, device=device) % tile


def _build_order(rows: tuple[Kind, ...], columns: tuple[Kind, ...], device: torch.device) -> torch.Tensor:
    """Where each position's query sits in the concatenation of all calls."""
    tile_h, tile_w = len(rows[0].start), len(columns[0].start)
    sizes = [len(a.tiles) * len(b.tiles) * tile_h * tile_w for a in rows for b in columns]
    base = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=device).view(len(rows), len(columns))
    across = torch.tensor([len(kind.tiles) for kind in columns], device=device)
    (kind_h, t_h, i_h), (kind_w, t_w, i_w) = _slots(rows, device), _slots(columns, device)
    tile = t_h[:, None] * across[kind_w] + t_w
    return (base[kind_h][:, kind_w] + (tile * tile_h + i_h[:, None]) * tile_w + i_w).flatten()


def build_plan(members: tuple[int, int], kernel: tuple[int, int], device: torch.device) -> Plan:
    kinds_h, kinds_w = kinds(members[0], kernel[0]), kinds(members[1], kernel[1])
    single = (len(kinds_h[0].start), len(kinds_w[0].start)) == members
    calls = []
    for rows in kinds_h:
        inside_h, bias_h, queries_h, keys_h = _axis_tables(rows, kernel[0], device)
        for columns in kinds_w:
            inside_w, bias_w, queries_w, keys_w = _axis_tables(columns, kernel[1], device)
            real = None
            if not all(map(all, rows.real + columns.real)):
                real_h, real_w = torch.tensor(rows.real, device=device), torch.tensor(columns.real, device=device)
                real = (real_h[:, None, :, None] & real_w[None, :, None, :]).reshape(-1, 1)
            inside = (inside_h[:, None, :, None] & inside_w[None, :, None, :]).reshape(
                len(rows.start) * len(columns.start), rows.halo * columns.halo
            )
            calls.append(
                Tiles(
                    rows=rows,
                    columns=columns,
                    queries=None if single else _outer(queries_h, queries_w, members[1]),
                    real=real,
                    keys=None if single else _outer(keys_h, keys_w, members[1]),
                    outside=None if members == kernel else ~inside,
                    bias=(bias_h[:, None, :, None] * (2 * kernel[1] - 1) + bias_w[None, :, None, :]).flatten(),
                )
            )
    return Plan(tuple(calls), None if single else _build_order(kinds_h, kinds_w, device))


def _class_positions(rows: Fold, columns: Fold, dilation: tuple[int, int], width: int, device: torch.device):
    """Positions of a group of classes in the flattened map, class by class."""

    def axis(fold: Fold, step: int) -> torch.Tensor:
        classes = torch.arange(fold.first, fold.last, device=device)[:, None]
        return classes + step * torch.arange(fold.members, device=device)

    return _outer(axis(rows, dilation[0]), axis(columns, dilation[1]), width)


@dataclass(frozen=True)
class Folding:
    """The groups of equally large residue classes of a map.

    Attributes:
        members: Per group, the size of a class's map.
        positions: Per group, the flattened map's positions class by class; None if a reshape is enough.
        order: Where each position sits in the concatenation of the groups; None if a reshape is enough.
    """

    members: tuple[tuple[int, int], ...]
    positions: tuple[torch.Tensor, ...] | None
    order: torch.Tensor | None


def build_folding(size: tuple[int, int], dilation: tuple[int, int], device: torch.device) -> Folding:
    groups = [(rows, columns) for rows in folds(size[0], dilation[0]) for columns in folds(size[1], dilation[1])]
    members = tuple((rows.members, columns.members) for rows, columns in groups)
    if len(groups) == 1:
        return Folding(members, None, None)
    positions = tuple(_class_positions(rows, columns, dilation, size[1], device) for rows, columns in groups)
    return Folding(members, positions, _folded_places(groups, size, dilation, device))


def _folded_places(
    groups: list[tuple[Fold, Fold]], size: tuple[int, int], dilation: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Where each position of a map sits in the concatenation of the groups: (H * W,).

    Computed by arithmetic, because an exported graph would sort the groups' positions at every run.
    """
    y, x = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    row_class, column_class = y % dilation[0], x % dilation[1]
    row_member, column_member = y // dilation[0], x // dilation[1]
    places, begin = torch.zeros(size, dtype=torch.int64, device=device), 0
    for rows, columns in groups:
        number = (row_class - rows.first) * columns.classes + (column_class - columns.first)
        place = begin + (number * rows.members + row_member) * columns.members + column_member
        of_rows = (row_class >= rows.first) & (row_class < rows.last)
        of_columns = (column_class >= columns.first) & (column_class < columns.last)
        places = torch.where(of_rows & of_columns, place, places)
        begin += rows.classes * columns.classes * rows.members * columns.members
    return places.flatten()


class Traced:
    """Tables and gathers for exporters: tables become constants of the graph, and gathers keep the batch symbolic."""

    plan: Callable[..., Plan] = staticmethod(build_plan)
    folding: Callable[..., Folding] = staticmethod(build_folding)

    @staticmethod
    def gather(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Take (heads, B, N, D) at positions along N."""
        return x.index_select(2, positions)


class Eager(Traced):
    """Tables and gathers for real tensors. Tables are cached, so tracing must not use them: they would be fake."""

    plan = staticmethod(lru_cache(maxsize=128)(build_plan))
    folding = staticmethod(lru_cache(maxsize=128)(build_folding))

    @staticmethod
    def gather(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # On CPU index_select copies whole rows along the first axis only; along others it is up to 30 times slower.
        heads, batch, count, dim = x.shape
        first = torch.arange(0, heads * batch * count, count, device=x.device)[:, None]
        return x.reshape(-1, dim).index_select(0, (first + positions).flatten()).view(heads, batch, -1, dim)


def fold(x: torch.Tensor, dilation: tuple[int, int], folding: Folding, mode: type[Traced]) -> list[torch.Tensor]:
    """(B, H, W, heads, D) -> per group (heads, B * classes, N, D): heads first, so that one mask serves all tiles."""
    heads, dim = x.shape[3:]
    # The batch is never given as a number: an exporter may see a batch of 1, and would fix it.
    if folding.positions is None:
        (rows, columns), (step_h, step_w) = folding.members[0], dilation
        x = x.reshape(-1, rows, step_h, columns, step_w, heads, dim).permute(5, 0, 2, 4, 1, 3, 6)
        # Made contiguous here; otherwise every gather would copy the tensor again.
        return [x.reshape(heads, -1, rows * columns, dim).contiguous()]
    x = x.permute(3, 0, 1, 2, 4).flatten(2, 3)
    return [
        mode.gather(x, positions).view(heads, -1, rows * columns, dim)
        for positions, (rows, columns) in zip(folding.positions, folding.members)
    ]


def unfold(
    groups: list[torch.Tensor], shape: torch.Size, dilation: tuple[int, int], folding: Folding, mode: type[Traced]
) -> torch.Tensor:
    """The inverse of `fold`; `shape` is the shape of the map."""
    _, height, width, heads, dim = shape
    height, width = int(height), int(width)
    if folding.positions is None:
        (rows, columns), (step_h, step_w) = folding.members[0], dilation
        x = groups[0].reshape(heads, -1, step_h, step_w, rows, columns, dim).permute(1, 4, 2, 5, 3, 0, 6)
        return x.reshape(-1, height, width, heads, dim)
    counts = [positions.shape[0] for positions in folding.positions]
    x = torch.cat([group.reshape(heads, -1, count, dim) for group, count in zip(groups, counts)], dim=2)
    x = mode.gather(x, folding.order)
    return x.reshape(heads, -1, height, width, dim).permute(1, 2, 3, 0, 4).contiguous()


def take(x: torch.Tensor, positions: torch.Tensor | None, length: int, mode: type[Traced]) -> torch.Tensor:
    """(heads, B, N, D) -> the tiles (heads, B * tiles, length, D)."""
    if positions is None:
        return x
    return mode.gather(x, positions).view(x.shape[0], -1, length, x.shape[3])


def additive(rpb: torch.Tensor | None, call: Tiles, like: torch.Tensor) -> torch.Tensor | None:
    """The table that is added to the scores of a tile: (heads or 1, 1, M, N), or None if nothing is added."""
    shape = (-1, 1, call.query_count, call.key_count)
    if rpb is not None:
        table = rpb.flatten(1).index_select(1, call.bias).view(shape).to(like.dtype)
    elif call.outside is not None:
        table = torch.zeros(shape[2:], dtype=like.dtype, device=like.device)[None, None]
    else:
        return None
    return table if call.outside is None else table.masked_fill(call.outside, float("-inf"))


def in_order(calls: list[torch.Tensor], group: torch.Tensor, plan: Plan, mode: type[Traced]) -> torch.Tensor:
    """The tiles of all calls (heads, B * tiles, M, D) -> (heads, B, N, D), each query in its place."""
    heads, _, _, dim = group.shape
    counts = [len(call.rows.tiles) * len(call.columns.tiles) * call.query_count for call in plan.calls]
    parts = [part.reshape(heads, -1, count, dim) for part, count in zip(calls, counts)]
    return parts[0] if plan.order is None else mode.gather(torch.cat(parts, dim=2), plan.order)

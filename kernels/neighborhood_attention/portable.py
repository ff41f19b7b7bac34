"""Neighborhood attention in standard PyTorch operations and index tables: what export traces, and the backward pass.

(Forward on real tensors is strided.py, which needs no tables.) Residue classes are folded into the batch, each class
is cut into query tiles with a halo of keys (tiling.py), and each kind of tile is one batched
`scaled_dot_product_attention` with an additive table that holds the bias, or -inf outside the window. Where the map
is kernel x dilation a class is one tile without a mask: plain dense attention. The backward pass recomputes the
weights tile by tile, so nothing but the inputs is kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from terrazzo.kernels.neighborhood_attention.tiling import Fold, Kind, folds, kinds

# Weights alive at once in the backward pass; about what two cores' caches hold (README.md).
_CHUNK = 1 << 19


@dataclass(frozen=True)
class _Call:
    """One kind of tile, as index tables over a class's flattened map of N positions.

    Attributes:
        rows, columns: The kinds of the two axes.
        queries: (tiles * M,) positions, or None where the class is one tile.
        real: (tiles * M, 1) 0 where a query is a repeat that only fills its tile, or None where there is none.
        keys: (tiles * N,) positions, or None where the class is one tile.
        outside: (M, N) True where a key is outside the window, or None where no key is.
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
class _Plan:
    """Every call of a class's map, and where each position's query sits in their concatenation (None: in order)."""

    calls: tuple[_Call, ...]
    order: torch.Tensor | None


def _outer(rows: torch.Tensor, columns: torch.Tensor, stride: int) -> torch.Tensor:
    """Flat indices of the products of (tiles, length) rows and columns: (tiles_h * tiles_w * length_h * length_w,)."""
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
    """Per position of an axis: which kind holds its query, in which of the kind's tiles, and where in the tile."""
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


def _build_plan(members: tuple[int, int], kernel: tuple[int, int], device: torch.device) -> _Plan:
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
                _Call(
                    rows=rows,
                    columns=columns,
                    queries=None if single else _outer(queries_h, queries_w, members[1]),
                    real=real,
                    keys=None if single else _outer(keys_h, keys_w, members[1]),
                    outside=None if members == kernel else ~inside,
                    bias=(bias_h[:, None, :, None] * (2 * kernel[1] - 1) + bias_w[None, :, None, :]).flatten(),
                )
            )
    return _Plan(tuple(calls), None if single else _build_order(kinds_h, kinds_w, device))


def _class_positions(rows: Fold, columns: Fold, dilation: tuple[int, int], width: int, device: torch.device):
    """Positions of a group of classes in the flattened map, class by class."""

    def axis(fold: Fold, step: int) -> torch.Tensor:
        classes = torch.arange(fold.first, fold.last, device=device)[:, None]
        return classes + step * torch.arange(fold.members, device=device)

    return _outer(axis(rows, dilation[0]), axis(columns, dilation[1]), width)


@dataclass(frozen=True)
class _Folding:
    """How a map falls into groups of residue classes of equal size.

    Attributes:
        members: Per group, the size of a class's map.
        positions: Per group, the flattened map's positions class by class; None where reshaping does it.
        order: Where each position sits in the concatenation of the groups; None where reshaping does it.
    """

    members: tuple[tuple[int, int], ...]
    positions: tuple[torch.Tensor, ...] | None
    order: torch.Tensor | None


def _build_folding(size: tuple[int, int], dilation: tuple[int, int], device: torch.device) -> _Folding:
    groups = [(rows, columns) for rows in folds(size[0], dilation[0]) for columns in folds(size[1], dilation[1])]
    members = tuple((rows.members, columns.members) for rows, columns in groups)
    if len(groups) == 1:
        return _Folding(members, None, None)
    positions = tuple(_class_positions(rows, columns, dilation, size[1], device) for rows, columns in groups)
    return _Folding(members, positions, _folded_places(groups, size, dilation, device))


def _folded_places(
    groups: list[tuple[Fold, Fold]], size: tuple[int, int], dilation: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Where each position of a map sits in the concatenation of the groups: (H * W,).

    By arithmetic and not by sorting the groups' positions, which in an exported graph would be done at every run.
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
    """How export runs the form: tables become constants of the graph, and gathers keep the batch symbolic."""

    plan: Callable[..., _Plan] = staticmethod(_build_plan)
    folding: Callable[..., _Folding] = staticmethod(_build_folding)

    @staticmethod
    def gather(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(heads, B, N, D) at positions of N."""
        return x.index_select(2, positions)


class Eager(Traced):
    """How real tensors run it: tables are kept from call to call. Tracing must not use it: it would keep fake ones."""

    plan = staticmethod(lru_cache(maxsize=128)(_build_plan))
    folding = staticmethod(lru_cache(maxsize=128)(_build_folding))

    @staticmethod
    def gather(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # On CPU index_select copies whole rows along the first axis only; elsewhere it is up to 30 times slower.
        heads, batch, count, dim = x.shape
        first = torch.arange(0, heads * batch * count, count, device=x.device)[:, None]
        return x.reshape(-1, dim).index_select(0, (first + positions).flatten()).view(heads, batch, -1, dim)


def _fold(x: torch.Tensor, dilation: tuple[int, int], folding: _Folding, mode: type[Traced]) -> list[torch.Tensor]:
    """(B, H, W, heads, D) -> per group (heads, B * classes, N, D): heads first, so that one mask serves all tiles."""
    heads, dim = x.shape[3:]
    # Nowhere is the batch given as a number: exporters may see one of 1, and would fix it.
    if folding.positions is None:
        (rows, columns), (step_h, step_w) = folding.members[0], dilation
        x = x.reshape(-1, rows, step_h, columns, step_w, heads, dim).permute(5, 0, 2, 4, 1, 3, 6)
        # Contiguous now, or every gather from it would copy it again.
        return [x.reshape(heads, -1, rows * columns, dim).contiguous()]
    x = x.permute(3, 0, 1, 2, 4).flatten(2, 3)
    return [
        mode.gather(x, positions).view(heads, -1, rows * columns, dim)
        for positions, (rows, columns) in zip(folding.positions, folding.members)
    ]


def _unfold(
    groups: list[torch.Tensor], shape: torch.Size, dilation: tuple[int, int], folding: _Folding, mode: type[Traced]
) -> torch.Tensor:
    """The inverse of `_fold`; `shape` is that of the map."""
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


def _take(x: torch.Tensor, positions: torch.Tensor | None, length: int, mode: type[Traced]) -> torch.Tensor:
    """(heads, B, N, D) -> the tiles (heads, B * tiles, length, D)."""
    if positions is None:
        return x
    return mode.gather(x, positions).view(x.shape[0], -1, length, x.shape[3])


def _additive(rpb: torch.Tensor | None, call: _Call, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of a tile: (heads or 1, 1, M, N), or None where nothing is."""
    shape = (-1, 1, call.query_count, call.key_count)
    if rpb is not None:
        table = rpb.flatten(1).index_select(1, call.bias).view(shape).to(like.dtype)
    elif call.outside is not None:
        table = torch.zeros(shape[2:], dtype=like.dtype, device=like.device)[None, None]
    else:
        return None
    return table if call.outside is None else table.masked_fill(call.outside, float("-inf"))


def _in_order(calls: list[torch.Tensor], group: torch.Tensor, plan: _Plan, mode: type[Traced]) -> torch.Tensor:
    """Every call's tiles (heads, B * tiles, M, D) -> (heads, B, N, D), each query in its place."""
    heads, _, _, dim = group.shape
    counts = [len(call.rows.tiles) * len(call.columns.tiles) * call.query_count for call in plan.calls]
    parts = [part.reshape(heads, -1, count, dim) for part, count in zip(calls, counts)]
    return parts[0] if plan.order is None else mode.gather(torch.cat(parts, dim=2), plan.order)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention on a map, to be traced; arguments and result as in `reference.neighborhood_attention`."""
    mode = Traced
    size = tuple(int(side) for side in query.shape[1:3])  # `torch.jit.trace` has tensors there
    folding = mode.folding(size, dilation, query.device)
    groups = []
    for q, k, v, members in zip(*(_fold(x, dilation, folding, mode) for x in (query, key, value)), folding.members):
        plan = mode.plan(members, kernel_size, query.device)
        outputs = []
        for call in plan.calls:
            tile_q = _take(q, call.queries, call.query_count, mode)
            tile_k = _take(k, call.keys, call.key_count, mode)
            tile_v = _take(v, call.keys, call.key_count, mode)
            outputs.append(F.scaled_dot_product_attention(tile_q, tile_k, tile_v, _additive(rpb, call, q), scale=scale))
        groups.append(_in_order(outputs, q, plan, mode))
    return _unfold(groups, query.shape, dilation, folding, mode)


def _overlap_add(total: torch.Tensor, tiles: torch.Tensor, rows: tuple[int, ...], call: _Call) -> None:
    """Add tiles' halos (P, tiles_h, tiles_w, halo_h, halo_w, D) into their map (P, H, W, D), axis by axis.

    `rows` holds the first key of each row of tiles. (`add_`, since `a[i] += b` would also copy the sum onto itself.)
    """
    columns = call.columns
    if len(columns.keys) == 1:
        first = columns.keys[0]
        for number, top in enumerate(rows):
            total[:, top : top + call.rows.halo, first : first + columns.halo].add_(tiles[:, number, 0])
        return
    # Tiles of a kind lie side by side, so pieces of one tile's length from all of them go in with one addition each.
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
    """Cut (heads, batch, rows of tiles) into contiguous parts of about `_CHUNK` weights, `size` to a row of tiles."""

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
    """One kind of tile: fills `grad_q`, adds to the totals, returns the gradient of `table`.

    Tiles are gathered, used and added back part by part, so that what is in flight stays in the caches.

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
        _fold(x, dilation, folding, mode)
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
            table = _additive(rpb, call, q)
            grad_table = _call_backward(call, table, q, k, v, g, grad_q, total_k, total_v)
            if grad_rpb is not None:
                grad_rpb.scatter_add_(1, call.bias.expand(heads, -1), grad_table.view(heads, -1))
            parts_q.append(grad_q)
        grads_q.append(_in_order(parts_q, q, plan, mode) * scale)
        grads_k.append(total_k.view(k.shape))
        grads_v.append(total_v.view(v.shape))
    unfolded = (
        _unfold(groups, shape, dilation, folding, mode).to(query.dtype) for groups in (grads_q, grads_k, grads_v)
    )
    return *unfolded, None if rpb is None else grad_rpb.view(rpb.shape).to(rpb.dtype)

"""Plans: which keys every tile of queries attends to. Selectors make them, the operator computes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments

UNITS = ("block", "token", "all")
MERGES = ("unique", "mean")


@dataclass(frozen=True, eq=False)
class Segment:
    """Some keys of every query tile. All segments of a plan share one softmax.

    A key that a tile lists twice, or that two segments list, counts twice.

    Attributes:
        unit: "block": `index` holds numbers of blocks, each `Plan.key_tile` neighbouring keys, the last block may be
            shorter. "token": `index` holds numbers of keys. "all": every query attends to all keys, without an index.
        index: (B or 1, H or 1, query tiles or 1, L) int32 or int64, -1 where a list is shorter than L.
        count: (B or 1, H or 1, query tiles or 1) whole numbers: only the first `count` entries of a list are read.
            None reads all of them.
        key, value: (B, H, Nk, D) and (B, H, Nk, Dv), the segment's own keys (pooled tokens, centroids). None: the keys
            and values of the call. They have gradients.
        bias: added to the logits: a number, (B or 1, H or 1, Nk), or one value for each block,
            (B or 1, H or 1, ceil(Nk / key_tile)). It has a gradient. The multiplicity c of a key is the bias ln c.
        key_mask: (B or 1, Nk) bool, False for keys that no query attends to (padding).
    """

    unit: str = "block"
    index: torch.Tensor | None = None
    count: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    bias: torch.Tensor | float | None = None
    key_mask: torch.Tensor | None = None

    def listed(self) -> torch.Tensor:
        """`index` with -1 for all entries that are not read."""
        if self.count is None:
            return self.index
        place = torch.arange(self.index.shape[-1], device=self.index.device)
        return torch.where(place < self.count.unsqueeze(-1), self.index, -1)

    def key_bias(self, keys: int, key_tile: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias and the mask together: (B or 1, H or 1, Nk), -inf for masked keys. None without both."""
        bias = self.bias
        if isinstance(bias, torch.Tensor) and bias.dim():
            bias = bias.to(dtype)
            if bias.shape[-1] != keys:
                bias = bias.repeat_interleave(key_tile, -1)[..., :keys]
        else:  # a number shifts all logits of the segment: see `shift`
            bias = None
        if self.key_mask is None:
            return bias
        mask = self.key_mask.unsqueeze(1)
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero if bias is None else bias, -torch.inf)

    def shift(self) -> torch.Tensor | float:
        """The bias that all keys of the segment share."""
        per_key = self.bias is None or (isinstance(self.bias, torch.Tensor) and self.bias.dim() > 0)
        return 0.0 if per_key else self.bias


@dataclass(frozen=True, eq=False)
class Plan:
    """What a selector returns: the tiles of queries, and the keys that each of them attends to.

    Attributes:
        segments: at least one.
        query_tile: the number of neighbouring queries that share their lists. The last tile may be shorter.
        key_tile: the number of neighbouring keys in a block. The last block may be shorter.
        query_order: (B or 1, H or 1, slots) int32 or int64: the query in each slot of the tiles, -1 for an empty slot.
            None: the queries in their own order.
        merge: the output of a query that stands in several slots. "unique": there is none. "mean": the mean of the
            slots' outputs; its `lse` is over the keys of all its slots. A query in no slot has output 0 and lse -inf.
    """

    segments: Sequence[Segment]
    query_tile: int = 64
    key_tile: int = 64
    query_order: torch.Tensor | None = None
    merge: str = "unique"

    def tile(self, segment: Segment) -> int:
        """The number of keys that an entry of a segment's index means."""
        return 1 if segment.unit == "token" else self.key_tile

    def slots(self, queries: int) -> int:
        """The number of rows that are computed."""
        return queries if self.query_order is None else self.query_order.shape[-1]

    def density(self, query: torch.Tensor, key: torch.Tensor) -> float:
        """Selected pairs / (queries x keys), the mean over images and heads; keys are the call's own, `key`.

        Reads the indices: on a GPU the host waits for them.
        """
        batch, heads, queries, _ = query.shape
        order = torch.arange(queries)[None, None] if self.query_order is None else self.query_order
        filled = _padded(order.ge(0).double(), self.query_tile, 0).sum(-1)  # queries in each tile
        pairs = 0.0
        for segment in self.segments:
            keys = (key if segment.key is None else segment.key).shape[2]
            mask = torch.ones(1, 1, keys) if segment.key_mask is None else segment.key_mask.unsqueeze(1)
            mask = mask.double()
            if segment.unit == "all":
                listed = mask.sum(-1, keepdim=True)
            else:
                index, widths = segment.listed(), _padded(mask, self.tile(segment), 0).sum(-1)
                shape = torch.broadcast_shapes(index.shape[:2], widths.shape[:2])
                widths = widths.expand(*shape, -1).unsqueeze(2).expand(-1, -1, index.shape[2], -1)
                index = index.expand(*shape, -1, -1).long()
                listed = (widths.gather(-1, index.clamp(min=0)) * index.ge(0)).sum(-1)
            pairs += (filled.to(listed.device) * listed).expand(batch, heads, -1).sum().item()
        return pairs / (batch * heads * queries * key.shape[2])


def _padded(x: torch.Tensor, tile: int, value: float) -> torch.Tensor:
    """(..., N) in tiles: (..., ceil(N / tile), tile)."""
    return F.pad(x, (0, -x.shape[-1] % tile), value=value).unflatten(-1, (-1, tile))


def multiplicity(plan: Plan, segment: Segment, slots: int, keys: int) -> torch.Tensor:
    """How often every slot lists every key of a segment: (B or 1, H or 1, slots or 1, Nk) float64. Masks do not count.

    Dense: for the definition and for tests.
    """
    device = segment.index.device if segment.index is not None else None
    if segment.unit == "all":
        return torch.ones(1, 1, 1, keys, dtype=torch.float64, device=device)
    tile = plan.tile(segment)
    index = segment.listed().long()
    count = torch.zeros(*index.shape[:3], -(-keys // tile), dtype=torch.float64, device=device)
    count = count.scatter_add(-1, index.clamp(min=0), index.ge(0).double())
    count = count.repeat_interleave(tile, -1)[..., :keys]
    return count if count.shape[2] == 1 else count.repeat_interleave(plan.query_tile, 2)[:, :, :slots]


def plan_to_mask(plan: Plan, query: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
    """The pairs that a plan selects: (B, H, Nq, keys of all segments one after another) bool.

    For tests: attention with this mask, with the segments' keys, values and biases one after another, is what the
    operator computes, unless a key is listed twice or `merge` is "mean".

    Args:
        query, key: as in `block_sparse_attention`.
    """
    batch, heads, queries, _ = query.shape
    slots, parts = plan.slots(queries), []
    for segment in plan.segments:
        keys = (key if segment.key is None else segment.key).shape[2]
        part = multiplicity(plan, segment, slots, keys).to(query.device) > 0
        if segment.key_mask is not None:
            part = part & segment.key_mask[:, None, None]
        parts.append(part.expand(batch, heads, slots, keys))
    mask = torch.cat(parts, -1)
    if plan.query_order is None:
        return mask
    order = plan.query_order.long().expand(batch, heads, -1).unsqueeze(-1)
    found = mask.new_zeros(batch, heads, queries + 1, mask.shape[-1], dtype=torch.int32)
    place = torch.where(order < 0, queries, order).expand_as(mask)
    return found.scatter_add(2, place, mask.int())[:, :, :queries] > 0


def check(plan: Plan, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None) -> None:
    """Raise `InputError` for a plan that does not fit the tensors of a call.

    Numbers in indices are checked on a CPU only, since reading them from a GPU would synchronize. There the fused form
    skips numbers out of range.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan, got {type(plan).__name__}")
    for name in ("query_tile", "key_tile"):
        arguments.whole(getattr(plan, name), name, 1)
    if plan.merge not in MERGES:
        raise InputError(f"merge {plan.merge!r} is not one of {', '.join(MERGES)}")
    if not plan.segments:
        raise InputError("a plan needs at least 1 segment, got 0: use Segment('all') for dense attention")
    batch, heads, queries, _ = query.shape
    if plan.query_order is not None:
        _check_whole(plan.query_order, "query_order", query, (batch, heads, None))
        _check_range(plan.query_order, "query_order", queries, "queries")
    tiles = -(-plan.slots(queries) // plan.query_tile)
    for number, segment in enumerate(plan.segments):
        _check_segment(segment, f"segments[{number}]", plan, query, key, value, tiles)


def _check_segment(segment, name: str, plan: Plan, query, key, value, tiles: int) -> None:
    if segment.unit not in UNITS:
        raise InputError(f"unit {segment.unit!r} of {name} is not one of {', '.join(UNITS)}")
    if (segment.key is None) != (segment.value is None):
        raise InputError(f"{name} has a key or a value, but not both: give both, or neither")
    if segment.key is None and key is None:
        raise InputError(f"{name} has no key and value, and the call has none either: give them to one of the two")
    own_key, own_value = (key, value) if segment.key is None else (segment.key, segment.value)
    if segment.key is not None:
        check_keys(query, own_key, own_value, f"{name}: ")
    if own_value.shape[-1] != (plan.segments[0].value if plan.segments[0].value is not None else value).shape[-1]:
        raise InputError(f"all values must have one last axis, got {own_value.shape[-1]} in {name}")
    batch, heads, keys, _ = own_key.shape
    if (segment.index is None) != (segment.unit == "all"):
        raise InputError(f'{name} must have an index, unless its unit is "all"')
    units = -(-keys // plan.tile(segment))
    if segment.index is not None:
        _check_whole(segment.index, f"index of {name}", query, (batch, heads, tiles, None))
        _check_range(segment.index, f"index of {name}", units, "keys" if segment.unit == "token" else "blocks")
    if segment.count is not None:
        if segment.index is None:
            raise InputError(f"{name} has a count, but no index that it could shorten")
        _check_whole(segment.count, f"count of {name}", query, (batch, heads, tiles))
    if isinstance(segment.bias, torch.Tensor) and segment.bias.dim():
        arguments.check_tensors({"query": query, f"bias of {name}": segment.bias})
        last = (keys, -(-keys // plan.key_tile))
        if (
            segment.bias.dim() != 3
            or not _broadcasts(segment.bias, (batch, heads))
            or segment.bias.shape[2] not in last
        ):
            raise InputError(
                f"bias of {name} must be a number or ({batch} or 1, {heads} or 1, {last[0]} keys or {last[1]} blocks), "
                f"got {tuple(segment.bias.shape)}"
            )
    elif segment.bias is not None and not isinstance(segment.bias, torch.Tensor):
        arguments.finite(segment.bias, f"bias of {name}")
    if segment.key_mask is not None:
        arguments.check_together({"query": query, f"key_mask of {name}": segment.key_mask})
        mask = segment.key_mask
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != keys:
            raise InputError(
                f"key_mask of {name} must be ({batch} or 1, {keys}) bool, got {tuple(mask.shape)} of {mask.dtype}"
            )


def check_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: str = "") -> None:
    """Raise `InputError` for keys and values that do not fit the queries."""
    arguments.check_tensors({"query": query, "key": key, "value": value})
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise InputError(
            f"{where}key must be (B, H, Nk, D) and value (B, H, Nk, Dv), "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise InputError(
            f"{where}key and query must agree in batch, heads and the last axis, "
            f"got {tuple(key.shape)} and {tuple(query.shape)}"
        )
    if arguments.any_empty(*value.shape[1:]):
        raise InputError(f"{where}there must be at least 1 head, key and channel, got values {tuple(value.shape)}")
    arguments.check_one_dtype(query=query, key=key, value=value)


def _broadcasts(x: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    return all(wanted is None or size in (1, wanted) for size, wanted in zip(x.shape, shape))


def _check_whole(x: object, name: str, query: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Check a tensor of whole numbers: its axes are those of `shape`, or 1; None is any size."""
    arguments.check_together({"query": query, name: x})
    if x.dim() != len(shape) or not _broadcasts(x, shape) or x.dtype not in (torch.int32, torch.int64):
        wanted = ", ".join("any" if size is None else f"{size} or 1" for size in shape)
        raise InputError(f"{name} must be ({wanted}) int32 or int64, got {tuple(x.shape)} of {x.dtype}")


def _check_range(x: torch.Tensor, name: str, limit: int, what: str) -> None:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or not x.numel():
        return
    low, high = (int(found) for found in x.aminmax())
    if low < -1 or high >= limit:
        raise InputError(f"{name} must be from -1 to {limit - 1}, the last of the {limit} {what}; got {low} to {high}")

"""What surrounds attention to one segment: the order of the queries, and one softmax over several segments."""

import torch

from terrazzo.kernels.dispatch.dtypes import accumulator


def in_slots(query: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """The queries (B, H, Nq, D) in the slots of a plan's tiles; an empty slot holds query 0, and its result is lost."""
    if order is None:
        return query
    index = order.long().clamp(min=0).unsqueeze(-1)
    return query.gather(2, index.expand(*query.shape[:2], -1, query.shape[3]))


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys of two segments, from the pair (out, lse) of each. -inf means a row without keys."""
    (out, lse), (other, other_lse) = first, second
    # Two rows without keys are merged as if their sums were 1: -inf minus -inf would be NaN.
    empty = lse.isneginf() & other_lse.isneginf()
    lse, other_lse = lse.masked_fill(empty, 0), other_lse.masked_fill(empty, 0)
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    merged = torch.lerp(out.to(weight.dtype), other.to(weight.dtype), weight).to(out.dtype)
    return merged, torch.logaddexp(lse, other_lse).masked_fill(empty, -torch.inf)


def from_slots(
    out: torch.Tensor, lse: torch.Tensor, order: torch.Tensor | None, merge: str, queries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of the slots, (B, H, slots, Dv) and (B, H, slots), at their queries; see `Plan.merge`."""
    if order is None:
        return out, lse
    batch, heads, _, width = out.shape
    order = order.long().expand(batch, heads, -1)
    place = torch.where(order < 0, queries, order)  # one more row takes the empty slots
    wide = place.unsqueeze(-1).expand(-1, -1, -1, width)
    nothing = lse.new_full((batch, heads, queries + 1), -torch.inf)
    if merge == "unique":
        out = out.new_zeros(batch, heads, queries + 1, width).scatter(2, wide, out)
        return out[:, :, :queries], nothing.scatter(2, place, lse)[:, :, :queries]
    dtype = accumulator(out)
    total = out.new_zeros(batch, heads, queries + 1, width, dtype=dtype).scatter_add(2, wide, out.to(dtype))
    count = torch.zeros_like(nothing).scatter_add(2, place, torch.ones_like(lse)).clamp(min=1)
    highest = nothing.scatter_reduce(2, place, lse.detach(), "amax").clamp(min=torch.finfo(lse.dtype).min)
    sums = torch.zeros_like(nothing).scatter_add(2, place, (lse - highest.gather(2, place)).exp())
    empty = sums == 0
    lse = (highest + sums.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
    return (total / count.unsqueeze(-1)).to(out.dtype)[:, :, :queries], lse[:, :, :queries]

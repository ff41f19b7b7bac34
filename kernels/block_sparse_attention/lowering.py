"""A segment as the forms take it: every unit and every kind of bias and count becomes one table and one bias."""

import dataclasses
from typing import NamedTuple

import torch

from terrazzo.kernels.block_sparse_attention.plan import Plan


class Keys(NamedTuple):
    """The keys of one segment.

    Attributes:
        key, value: (B, H, Nk, D) and (B, H, Nk, Dv).
        index: (B or 1, H or 1, tiles or 1, L) int32, L at least 1: numbers of blocks of `tile` keys, -1 for no block.
            None: all keys.
        bias: (B or 1, H or 1, Nk), -inf for masked keys; or None.
        tile: keys of a block.
        shift: added to all logits of the segment.
    """

    key: torch.Tensor
    value: torch.Tensor
    index: torch.Tensor | None
    bias: torch.Tensor | None
    tile: int
    shift: torch.Tensor | float


def lower(plan: Plan, key: torch.Tensor | None, value: torch.Tensor | None, dtype: torch.dtype) -> list[Keys]:
    """The segments of a plan for the keys and values of a call; biases are in `dtype`."""
    found = []
    for segment in plan.segments:
        own_key, own_value = (key, value) if segment.key is None else (segment.key, segment.value)
        index = None
        if segment.index is not None:
            index = segment.listed().int()
            if index.shape[-1] == 0:  # lists without any entry
                index = index.new_full((*index.shape[:3], 1), -1)
        bias = segment.key_bias(own_key.shape[2], plan.key_tile, dtype)
        found.append(Keys(own_key, own_value, index, bias, plan.tile(segment), segment.shift()))
    return found


def autocast(query, key, value, plan):
    """The arguments of a call in the dtype of autocast, if it is on: norms of queries and keys return float32."""
    if not isinstance(query, torch.Tensor) or query.device.type == "meta" or not isinstance(plan, Plan):
        return query, key, value, plan
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value, plan
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x):
        rounded = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if rounded else x

    segments = [dataclasses.replace(x, key=cast(x.key), value=cast(x.value)) for x in plan.segments]
    return cast(query), cast(key), cast(value), dataclasses.replace(plan, segments=segments)

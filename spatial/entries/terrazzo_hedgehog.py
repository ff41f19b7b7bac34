"""The mixer `hedgehog`: sums over all ranks' tokens."""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers.hedgehog import features
from terrazzo.spatial._attention import linear_attention
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import counted


def _mix(
    part: Part, mixer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
) -> torch.Tensor:
    key, own = (counted(part, x, 2) for x in (key, value))
    query, key = features(query, mixer.query_map), features(key, mixer.key_map)
    return linear_attention(part, query, key, own.to(key.dtype)).to(value.dtype)


ENTRIES = {"Hedgehog": Entry(_mix)}

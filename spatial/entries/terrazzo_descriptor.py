"""The mixer `descriptor`: own queries attend to descriptors of all ranks' keys and values."""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import all_tokens


def _mix(
    part: Part, mixer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
) -> torch.Tensor:
    level = part.tokens
    key, raw, value = all_tokens(part, key, place.raw_key, value)
    x = None if mixer.cells is None else all_tokens(part, place.x.unsqueeze(1))[0].squeeze(1)
    return mixer.mix(query, key, value, place._replace(grid=(level.height, level.width), raw_key=raw, x=x))


def _check(mixer: nn.Module) -> str | None:
    return None if mixer.local is None else "tiles of queries are not done across ranks: convert with local=None"


ENTRIES = {"Descriptor": Entry(_mix, kept=("cells",), check=_check)}

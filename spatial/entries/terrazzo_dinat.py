"""NAT and DiNAT."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._neighborhoods import neighborhoods
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part


def _attend(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's input is exchanged, not queries, keys and values: it has a third of their numbers."""
    level = part.level(x, 1)
    needs = neighborhoods(level, module.kernel_size, module.dilation)
    return part.extended(x, 1, level, needs, lambda rows: own(module, rows))


ENTRIES = {
    **dict.fromkeys(("NAT", "IsotropicNAT", "NATBlock", "ConvTokenizer"), OWN),
    "NeighborhoodAttention": Entry(_attend),
}

"""NAT and DiNAT."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._neighborhoods import neighborhoods
from terrazzo.spatial._part import Part


def _update(part: Part, block: nn.Module, x: torch.Tensor, norm: nn.Module, mix: nn.Module) -> torch.Tensor:
    """Attention to the rows around the own rows, or the MLP.

    The block's input is exchanged, and the norm of the rows is computed again. So nothing but this input waits for
    other ranks. It has a third of the numbers of queries, keys and values.
    """
    if mix is not block.attn:
        return mix(norm(x))
    level = part.level(x, 1)
    needs = neighborhoods(level, mix.kernel_size, mix.dilation)
    return part.extended(x, 1, level, needs, lambda rows: mix(norm(rows)))


ENTRIES = {
    **dict.fromkeys(("NAT", "IsotropicNAT", "ConvTokenizer"), OWN),
    "NATBlock": Entry(_update, method="update", kept=("attn",)),
}

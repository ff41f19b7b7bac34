"""S2AFormer: convolutions, and attention to keys of a reduced map."""

import torch
from torch import nn

from terrazzo.kernels import strip_attention
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import convolve
from terrazzo.spatial._part import Part


def _attend(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """All ranks get all keys and values, of which a reduced map has few."""
    reduced = x
    if module.reduce is not None:
        excess = ((module.reduction - 1) * module.dilation,) * 2
        reduced = convolve(part, module.reduce.conv, x.permute(0, 3, 1, 2), excess)
        reduced = module.reduce.norm(reduced).permute(0, 2, 3, 1)
    level = part.level(reduced, 1)
    counts = [(end - start) * level.width for start, end in level.rows]
    query, key, value = (
        layer(y).flatten(1, 2) for layer, y in ((module.q, x), (module.k, reduced), (module.v, reduced))
    )
    widths = [key.shape[2], value.shape[2]]
    key, value = part.joined(torch.cat([key, value], 2), 1, counts).split(widths, 2)
    out = strip_attention(query, key, value.unflatten(-1, (module.num_heads, -1)))
    return module.proj(out.reshape(x.shape))


def _embed(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    excess = (module.dilation,) * 2  # a 2x2 patch, of pixels that are this far apart
    return module.norm(convolve(part, module.proj, x.permute(0, 3, 1, 2), excess).permute(0, 2, 3, 1))


ENTRIES = {
    **dict.fromkeys(("S2AFormer", "HybridPerceptionBlock", "LocalInteraction", "Stem", "ConvHead"), OWN),
    "StripSelfAttention": Entry(_attend),
    "PatchEmbed": Entry(_embed),
}

"""The mixer `na`: the rows around a rank's own rows."""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.spatial._attention import attention
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._neighborhoods import neighborhoods
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import counted, counts


def _mix(
    part: Part, mixer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
) -> torch.Tensor:
    level, prefix = part.tokens, place.prefix
    whole = place._replace(grid=(level.height, level.width))
    others = [counted(part, x, 2) for x in (key, value)]
    if mixer.dense(whole.grid, prefix) is not None:
        return attention(part, query, *others, counts(part), None)
    kernel, dilation, _ = mixer._windows(query, whole)
    tensors = torch.cat([query, key, value], 3)
    front, patches = tensors.tensor_split([prefix], 2)

    def run(rows: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([front, rows.flatten(2, 3)], 2).chunk(3, 3)
        out = mixer.mix(*tokens, place._replace(grid=tuple(rows.shape[2:4])))
        return out[:, :, prefix:].unflatten(2, rows.shape[2:4])

    needs = neighborhoods(level, kernel[0], dilation[0])
    out = part.extended(patches.unflatten(2, (-1, level.width)), 2, level, needs, run).flatten(2, 3)
    if not prefix:
        return out
    first = attention(part, query[:, :, :prefix], *others, counts(part), None)  # they attend to all tokens
    return torch.cat([first, out], 2)


ENTRIES = {"NeighborhoodAttention": Entry(_mix)}

"""InfViT with Linear-InfSA or softmax attention. Every rank has the class token, and the tokens of its rows."""

import torch
from torch import nn

from terrazzo.backbones._layers import bicubic
from terrazzo.backbones.infvit import parts_of
from terrazzo.backbones.mixers._infsa import EPS
from terrazzo.spatial._attention import attention
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import convolve
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import begin, counted, counts


def _stem(part: Part, stem: nn.Module, x: torch.Tensor, state: object = None) -> torch.Tensor:
    x = convolve(part, stem.patches, x, (stem.patch_size - 1,) * 2)
    begin(part, x, prefix=1)
    level = part.level(x)
    if state is not None:
        state.grid = tuple(x.shape[2:])
    tokens = torch.cat([stem.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
    first, last = level.rows[part.rank]
    if level.height * level.width == stem.pos_embed.shape[1] - 1:
        own = stem.pos_embed[:, 1 + first * level.width : 1 + last * level.width]
    else:
        learned = stem.pos_embed[:, 1:].unflatten(1, stem.grid)
        rows, columns = (
            bicubic(old, new, learned, antialias=True)
            for old, new in zip(learned.shape[1:3], (level.height, level.width))
        )
        own = (rows[first:last] @ (columns @ learned).flatten(2)).unflatten(2, (level.width, -1)).flatten(1, 2)
    return tokens + torch.cat([stem.pos_embed[:, :1], own], 1)


def _sums(part: Part, pairs: object) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = zip(*pairs)
    return part.total(sum(first[1:], first[0])), part.total(sum(second[1:], second[0]))


def _linear(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parts = parts_of(counted(part, x))
    total, energy = _sums(part, (module._focus(piece) for piece in parts))
    context, weight = _sums(part, (module._context(piece, total / (energy + EPS)) for piece in parts))
    out = module.merged(module.rho(context.dtype) * context / (weight + EPS), x.dtype)
    return out.expand(-1, x.shape[1], -1)


def _softmax(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    query = module.by_head(module.q_proj(x), x.dtype)
    own = counted(part, x)
    key, value = (module.by_head(layer(own), x.dtype) for layer in (module.k_proj, module.v_proj))
    return module.merged(attention(part, query, key, value, counts(part), None), value.dtype)


ENTRIES = {
    **dict.fromkeys(("InfViT", "Block", "PreLogitsHead"), OWN),
    "Stem": Entry(_stem),
    "LinearInfSA": Entry(_linear),
    "Softmax": Entry(_softmax),
}

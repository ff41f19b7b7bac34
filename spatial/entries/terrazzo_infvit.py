"""InfViT with Linear-InfSA or softmax attention. Every rank has the class token, and the tokens of its rows."""

import functools

import torch
from torch import nn

from terrazzo.backbones.infvit import parts_of
from terrazzo.backbones.mixers._infsa import EPS
from terrazzo.spatial._attention import attention
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import counted, counts, stem


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
    "Stem": Entry(functools.partial(stem, any_grid=True)),
    "LinearInfSA": Entry(_linear),
    "Softmax": Entry(_softmax),
}

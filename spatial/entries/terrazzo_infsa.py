"""The mixer `infsa`: all ranks' keys and values, and a norm that is a sum over all ranks' queries."""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._infsa import EPS
from terrazzo.backbones.mixers.infsa import positive
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import all_tokens


def _mix(
    part: Part, mixer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
) -> torch.Tensor:
    dtype = accumulator(query, key, value)
    key, whole = all_tokens(part, key.to(dtype), value.to(dtype))
    with without_autocast(value):
        front, patches = (query.to(dtype) / query.shape[-1]).tensor_split([part.prefix], 2)
        first, energy_of_front = positive(front, key, whole)  # the same on all ranks
        out, energy = positive(patches, key, whole)
        energy = part.total(energy) + energy_of_front
        alive = energy > 0
        norm = torch.where(alive, torch.where(alive, energy, 1).sqrt(), 0)  # no gradient of the root of 0
        out = mixer.rho(dtype) * torch.cat([first, out], 2) / (norm + EPS)
    return out.to(value.dtype)


ENTRIES = {"InfSA": Entry(_mix)}

"""The mixer `linear_infsa`: sums over all ranks' tokens."""

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._infsa import EPS
from terrazzo.backbones.mixers.linear_infsa import agreements, focus
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._tokens import counted


def _mix(
    part: Part, mixer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place
) -> torch.Tensor:
    dtype = accumulator(query, key, value)
    with without_autocast(value):
        query, key, wide = (counted(part, x, 2).to(dtype) for x in (query, key, value))
        total, energy = (part.total(x) for x in focus(query))
        agreement = agreements(key, total / (energy + EPS))
        found = part.total(agreement.transpose(2, 3) @ wide)
        out = mixer.rho(dtype) * found / (part.total(agreement.sum(2, keepdim=True)) + EPS)
    return out.to(value.dtype).expand_as(value)


def _check(mixer: nn.Module) -> str | None:
    return None if mixer.dwc is None else "its local branch is not done across ranks: convert with local=False"


ENTRIES = {"LinearInfSA": Entry(_mix, check=_check)}

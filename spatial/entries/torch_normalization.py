"""PyTorch's layer norm and group norm."""

import torch
from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._norms import group_norm
from terrazzo.spatial._part import Part


def _check(norm: nn.Module) -> str | None:
    return None if len(norm.normalized_shape) == 1 else "normalises over positions, too"


def _group(part: Part, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return group_norm(part, x, norm.num_groups, norm.weight, norm.bias, norm.eps)


ENTRIES = {"LayerNorm": Entry(check=_check), "RMSNorm": Entry(check=_check), "GroupNorm": Entry(_group)}

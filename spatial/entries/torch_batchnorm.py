"""PyTorch's batch norms."""

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._norms import batch_norm
from terrazzo.spatial._part import Part


def _synchronised(part: Part, norm: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    if norm.training:
        raise InputError(
            f"{part.at} is a SyncBatchNorm, which does not know the ranks that share the image: use BatchNorm2d, "
            "which takes the sums of all of them"
        )
    return type(norm).forward(norm, x)


ENTRIES = {"BatchNorm2d": Entry(batch_norm), "SyncBatchNorm": Entry(_synchronised)}

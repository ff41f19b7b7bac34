"""PyTorch's batch norms."""

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._groups import Processes
from terrazzo.spatial._norms import batch_norm
from terrazzo.spatial._part import Part


def _synchronised(part: Part, norm: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """The statistics of all images of the norm's own group, to which the ranks that share an image belong."""
    if not norm.training:
        return type(norm).forward(norm, x)
    if part.group.shares_modules:
        raise InputError(
            f"{part.at} is a SyncBatchNorm, and the ranks that share the image are no processes: use BatchNorm2d, "
            "which takes the sums of all of them"
        )
    return batch_norm(part, norm, x, Processes(norm.process_group))


ENTRIES = {"BatchNorm2d": Entry(batch_norm), "SyncBatchNorm": Entry(_synchronised)}

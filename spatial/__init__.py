"""One huge image over several ranks, or over parts of the rows on one device: exact, for operators of all kinds.

`parallelize` makes a model work on an image whose rows several processes share; `tiled` makes it compute an image part
after part on one device. Both give modules the same forms, from one table (`_entries`). All operators exchange rows
through `Part`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._cuts import Level as Level
from terrazzo.spatial._cuts import rows as rows
from terrazzo.spatial._entries import OWN as OWN
from terrazzo.spatial._entries import Entry as Entry
from terrazzo.spatial._groups import Group as Group
from terrazzo.spatial._groups import LocalGroup as LocalGroup
from terrazzo.spatial._groups import Processes as Processes
from terrazzo.spatial._groups import as_group
from terrazzo.spatial._parallelize import largest_stride as largest_stride
from terrazzo.spatial._parallelize import parallelize as parallelize
from terrazzo.spatial._parallelize import restore as restore
from terrazzo.spatial._part import Part as Part
from terrazzo.spatial._part import active as active
from terrazzo.spatial._tiled import Tiled as Tiled
from terrazzo.spatial._tiled import tiled as tiled

__all__ = [
    "OWN",
    "Entry",
    "Group",
    "Level",
    "LocalGroup",
    "Part",
    "Processes",
    "Tiled",
    "active",
    "gather",
    "image",
    "largest_stride",
    "parallelize",
    "restore",
    "rows",
    "scatter",
    "sum_gradients",
    "tiled",
]


def scatter(image: torch.Tensor, group: "dist.ProcessGroup | Group | None" = None, stride: int = 32) -> torch.Tensor:
    """The own rows of an image (B, C, H, W) that each rank has as a whole.

    Args:
        group: The ranks that share the image; None for all processes.
        stride: The model's largest stride; the same as for `parallelize`.

    Raises:
        InputError: The image has too few rows for the group.
    """
    ranks = as_group(group)
    start, end = rows(image.shape[2], ranks.size, stride)[ranks.rank]
    return image[:, :, start:end]


def gather(y: torch.Tensor, group: "dist.ProcessGroup | Group | None" = None, dim: int = 2) -> torch.Tensor:
    """The whole map of the ranks' rows, on every rank, with gradients.

    Args:
        dim: The dimension of the rows: 2 for (B, C, H, W), 1 for (B, H, W, C).

    Raises:
        InputError: The ranks' tensors differ in another dimension.
    """
    ranks = as_group(group)
    shapes = [torch.Size(shape) for shape in ranks.objects(tuple(y.shape))]
    if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
        raise InputError(f"the ranks' maps differ in more than dimension {dim}: {[tuple(shape) for shape in shapes]}")
    return torch.cat(list(ranks.swap([y] * ranks.size, shapes)), dim)


@contextmanager
def image(
    height: int, width: int, group: "dist.ProcessGroup | Group | None" = None, stride: int = 32
) -> Iterator[Part]:
    """Modules that were parallelized work on one image inside the `with` block, also parts of a model and losses.

        with terrazzo.spatial.image(height, width) as part:
            maps = backbone.forward_intermediates(part.scatter(x), intermediates_only=True)
            loss = head.loss(maps, ...)
            loss.backward()

    Args:
        height, width: Size of the whole image.
        group: The ranks that share it; None for all processes.
        stride: The model's largest stride.

    Raises:
        InputError: The image has too few rows for the group.
    """
    with Part(as_group(group), height, width, stride).entered() as part:
        yield part


@torch.no_grad()
def sum_gradients(model: nn.Module, group: "dist.ProcessGroup | Group | None" = None) -> None:
    """Sum parameters' gradients over the ranks that share an image, after `backward`.

    The loss of each rank must be its share of the whole loss: a sum over its own pixels divided by the count of all
    ranks' pixels. A loss that each rank computes as a whole, for example from pooled features, is divided by the number
    of ranks.
    """
    ranks = as_group(group)
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = ranks.total(own)

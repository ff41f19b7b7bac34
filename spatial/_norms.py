"""Norms whose statistics are sums over all ranks."""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.spatial._groups import Group
from terrazzo.spatial._part import Part


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_norm(
    part: Part, x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`F.group_norm` of (B, C, H, W)."""
    level = part.level(x)
    if level.whole:
        return F.group_norm(x, groups, weight, bias, eps)
    parted = _wide(x).unflatten(1, (groups, -1))
    count = parted.shape[2] * level.height * level.width
    centred = parted - part.total(parted.sum((2, 3, 4), keepdim=True)) / count
    variance = part.total(centred.square().sum((2, 3, 4), keepdim=True)) / count
    out = (centred * (variance + eps).rsqrt()).flatten(1, 2).to(x.dtype)
    if weight is not None:
        out = out * weight[:, None, None]
    return out if bias is None else out + bias[:, None, None]


def batch_norm(
    part: Part, norm: nn.BatchNorm2d | nn.SyncBatchNorm, x: torch.Tensor, over: Group | None = None
) -> torch.Tensor:
    """Batch norm of (B, C, H, W); in training with the statistics of all ranks' pixels.

    Args:
        over: More ranks than share the image, whose pixels count, too; None for the part's.
    """
    if x.dim() != 4 or not (norm.training or norm.running_mean is None):
        return type(norm).forward(norm, x)
    level = part.level(x)
    if level.whole and over is None:
        return type(norm).forward(norm, x)
    wide = _wide(x)
    count = x.shape[0] * level.height * level.width
    if over is None:
        total = part.total
    else:
        # All ranks of a part have the same pooled map: each adds its share.
        share = 1 / part.group.size if level.whole else 1

        def total(sums: torch.Tensor) -> torch.Tensor:
            return over.total(sums * share)

        count = int(over.total(torch.tensor(count, device=x.device))) // part.group.size
    mean = total(wide.sum((0, 2, 3))) / count
    centred = wide - mean[:, None, None]
    variance = total(centred.square().sum((0, 2, 3))) / count
    if norm.training and norm.track_running_stats and (part.rank == 0 or not part.group.shares_modules):
        _follow(norm, mean.detach(), variance.detach() * count / (count - 1))
    out = (centred * (variance + norm.eps).rsqrt()[:, None, None]).to(x.dtype)
    if norm.weight is not None:
        out = out * norm.weight[:, None, None] + norm.bias[:, None, None]
    return out


def _follow(norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Update the running statistics."""
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)

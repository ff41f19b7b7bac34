"""mmsegmentation's cross entropy: a rank's share of it."""

from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import Entry
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part


def _cross_entropy(
    part: Part,
    loss: nn.Module,
    cls_score: torch.Tensor,
    label: torch.Tensor,
    weight: torch.Tensor | None = None,
    avg_factor: Any = None,
    reduction_override: str | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor:
    """The sum over own pixels, divided by what mmsegmentation divides the sum over all pixels by.

    Args:
        cls_score: (B, C, h, W).
        label: (B, h, W).
    """
    reduction = reduction_override or loss.reduction
    if loss.use_mask or reduction == "none":
        raise InputError(f"{part.at} has use_mask or no reduction, which is not done across ranks")
    valid = (label != ignore_index) & (label >= 0) if loss.use_sigmoid else label != ignore_index
    if reduction == "mean" and avg_factor is None:
        avg_factor = _divisor(part, loss, cls_score, label, valid)
    if loss.use_sigmoid and not valid.any():  # mmsegmentation looks for the largest label
        return cls_score.sum() * 0.0
    return own(loss, cls_score, label, weight, avg_factor, reduction_override, ignore_index, **options)


def _divisor(part: Part, loss: nn.Module, score: torch.Tensor, label: torch.Tensor, valid: torch.Tensor) -> Any:
    if loss.class_weight is not None and not loss.use_sigmoid:
        weights = score.new_tensor(loss.class_weight)[label]
        return part.total((weights * valid if loss.avg_non_ignore else weights).sum())
    channels = score.shape[1] if loss.use_sigmoid else 1
    if loss.avg_non_ignore:
        return int(part.total(valid.sum())) * channels
    level = part.level(label, 1)
    return label.shape[0] * level.height * level.width * channels


ENTRIES = {"CrossEntropyLoss": Entry(_cross_entropy)}

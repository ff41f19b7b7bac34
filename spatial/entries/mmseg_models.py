"""mmsegmentation's segmentors and heads of convolutions.

The segmentor's `forward(images)` gives logits. `forward(images, samples, mode="loss")`, with the own rows of images and
labels, gives the rank's share of each loss and of the accuracy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import Functions, through
from terrazzo.spatial._operators import own, resize
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.mmengine_model import no_loss


def _losses_of_head(part: Part, head: nn.Module, seg_logits: torch.Tensor, batch_data_samples: Sequence[Any]) -> dict:
    """`BaseDecodeHead.loss_by_feat`; labels are rows of the rank."""
    with Functions(part):
        losses = type(head).loss_by_feat(head, seg_logits, batch_data_samples)
    valid = sum((sample.gt_sem_seg.data != head.ignore_index).sum() for sample in batch_data_samples)
    losses["acc_seg"] = losses["acc_seg"] * (valid / part.total(valid).clamp(min=1))
    return losses


def _segment(part: Part, model: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
    if mode not in ("tensor", "loss"):
        raise InputError(f"across ranks a segmentor gives logits or losses, and has no mode '{mode}'")
    return own(model, inputs, data_samples, mode)


def _check_enlarging(layer: nn.Module) -> str | None:
    return None if not layer.size else "a fixed size; give a scale_factor"


def _enlarge(part: Part, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """mmsegmentation's `Upsample`, which turns its factor into a size."""
    level = part.level(x)
    rows, columns = layer.scale_factor if isinstance(layer.scale_factor, tuple) else (layer.scale_factor,) * 2
    return resize(part, x, (int(level.height * rows), int(level.width * columns)), layer.mode, layer.align_corners)


_HEAD = Entry(through, also=(Entry(_losses_of_head, "loss_by_feat"),))

ENTRIES = {
    "Upsample": Entry(_enlarge, check=_check_enlarging),
    "EncoderDecoder": Entry(_segment),
    "SegDataPreProcessor": OWN,
    "PPM": Entry(through),
    **dict.fromkeys(("FCNHead", "UPerHead", "FPNHead", "SegformerHead"), _HEAD),
    **dict.fromkeys(("DiceLoss", "FocalLoss", "LovaszLoss", "TverskyLoss"), Entry(no_loss)),
}

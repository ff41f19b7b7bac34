"""mmsegmentation's segmentors and heads of convolutions.

The segmentor's `forward(images)` gives logits. `forward(images, samples, mode="loss")`, with the own rows of images and
labels, gives the rank's share of each loss and of the accuracy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry, find
from terrazzo.spatial._functions import Functions, through
from terrazzo.spatial._operators import own, resize
from terrazzo.spatial._part import Part


def no_loss(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Losses that are no sum over pixels divided by a count."""
    raise InputError(
        f"{part.at} is a {type(module).__name__} of one rank's pixels, and not a share of the loss of all pixels: use "
        "CrossEntropyLoss (docs/spatial.md)"
    )


def untrainable(model: nn.Module) -> str | None:
    """Why a model cannot be trained on shared images by `mode="loss"`; None if nothing is known against it."""
    kinds = [f"{kind.__module__.split('.')[0]}.{kind.__qualname__}" for kind in type(model).__mro__]
    if "mmseg.EncoderDecoder" not in kinds:
        return f"the model is a {type(model).__name__}, and only segmentors (EncoderDecoder) train on shared images"
    for name, module in model.named_modules():
        if getattr(module, "loss_decode", None) is not None and module.sampler is not None:
            return f"{name} chooses pixels by a {type(module.sampler).__name__}, which sees one rank's pixels alone"
        entry = find(type(module), {})
        if entry is not None and entry.run is no_loss:
            return f"{name} is a {type(module).__name__}, which is no mean over pixels"
        if type(module).__name__ == "CrossEntropyLoss" and (module.use_mask or module.reduction == "none"):
            return f"{name} has use_mask or no reduction"
    return None


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

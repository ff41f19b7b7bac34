"""mmsegmentation's segmentors and heads of convolutions. The segmentor's `forward(images)` gives logits.

Its other modes resize logits to whole images, and its losses are means over a rank's pixels: both are refused.
"""

from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import through
from terrazzo.spatial._operators import own, resize
from terrazzo.spatial._part import Part


def _loss(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    raise InputError(
        f"{part.at} is a mean over the pixels of one rank: compute the loss from the logits, as a sum over own pixels "
        "divided by the count of all ranks' pixels (docs/spatial.md)"
    )


def _segment(part: Part, model: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
    if mode != "tensor":
        raise InputError(f"across ranks a segmentor gives logits, as model(images), and has no mode '{mode}'")
    return own(model, inputs, data_samples, mode)


def _check_enlarging(layer: nn.Module) -> str | None:
    return None if not layer.size else "a fixed size; give a scale_factor"


def _enlarge(part: Part, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """mmsegmentation's `Upsample`, which turns its factor into a size."""
    level = part.level(x)
    rows, columns = layer.scale_factor if isinstance(layer.scale_factor, tuple) else (layer.scale_factor,) * 2
    return resize(part, x, (int(level.height * rows), int(level.width * columns)), layer.mode, layer.align_corners)


ENTRIES = {
    "Upsample": Entry(_enlarge, check=_check_enlarging),
    "EncoderDecoder": Entry(_segment),
    "SegDataPreProcessor": OWN,
    **{name: Entry(through) for name in ("FCNHead", "UPerHead", "PPM", "FPNHead")},
    **{name: Entry(_loss) for name in ("CrossEntropyLoss", "DiceLoss", "FocalLoss", "LovaszLoss", "TverskyLoss")},
}

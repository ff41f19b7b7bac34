"""mmsegmentation's segmentors and heads of convolutions. The segmentor's `forward(images)` gives logits.

Its other modes resize logits to whole images, and its losses are means over a rank's pixels: both are refused.
"""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import through
from terrazzo.spatial._operators import resize
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.mmengine_model import as_tensors, refused_loss


def _check_enlarging(layer: nn.Module) -> str | None:
    return None if not layer.size else "a fixed size; give a scale_factor"


def _enlarge(part: Part, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """mmsegmentation's `Upsample`, which turns its factor into a size."""
    level = part.level(x)
    rows, columns = layer.scale_factor if isinstance(layer.scale_factor, tuple) else (layer.scale_factor,) * 2
    return resize(part, x, (int(level.height * rows), int(level.width * columns)), layer.mode, layer.align_corners)


ENTRIES = {
    "Upsample": Entry(_enlarge, check=_check_enlarging),
    "EncoderDecoder": Entry(as_tensors),
    "SegDataPreProcessor": OWN,
    **{name: Entry(through) for name in ("FCNHead", "UPerHead", "PPM", "FPNHead")},
    **{
        name: Entry(refused_loss) for name in ("CrossEntropyLoss", "DiceLoss", "FocalLoss", "LovaszLoss", "TverskyLoss")
    },
}

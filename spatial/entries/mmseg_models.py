"""mmsegmentation's segmentors and heads of convolutions. The segmentor's `forward(images)` gives logits.

Its losses are means over a rank's pixels, so they are refused when they are called.
"""

from typing import Any

from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import through
from terrazzo.spatial._part import Part


def _loss(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    raise InputError(
        f"{part.at} is a mean over the pixels of one rank: compute the loss from the logits, as a sum over own pixels "
        "divided by the count of all ranks' pixels (docs/spatial.md)"
    )


ENTRIES = {
    **dict.fromkeys(("EncoderDecoder", "SegDataPreProcessor"), OWN),
    **{name: Entry(through) for name in ("FCNHead", "UPerHead", "PPM", "FPNHead")},
    **{name: Entry(_loss) for name in ("CrossEntropyLoss", "DiceLoss", "FocalLoss", "LovaszLoss", "TverskyLoss")},
}

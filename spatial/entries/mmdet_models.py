"""mmdetection's detectors with heads of convolutions. The detector's `forward(images)` gives the heads' maps.

Its other modes make boxes or losses of whole images: they are refused.
"""

from typing import Any

from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import through
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.mmengine_model import no_loss


def as_tensors(part: Part, model: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
    """A model's `forward(images)`, which gives its head's maps. Its other modes need the whole image."""
    if mode != "tensor":
        raise InputError(
            f"across ranks {type(model).__name__} gives its head's maps, as model(images), and has no mode '{mode}'"
        )
    return own(model, inputs, data_samples, mode)


_LOSSES = "CrossEntropyLoss FocalLoss L1Loss SmoothL1Loss IoULoss GIoULoss DIoULoss CIoULoss QualityFocalLoss"

ENTRIES = {
    "SingleStageDetector": Entry(as_tensors),
    "DetDataPreprocessor": OWN,
    **{name: Entry(through) for name in ("RetinaHead", "RetinaSepBNHead", "FCOSHead", "ATSSHead")},
    **{name: Entry(no_loss) for name in _LOSSES.split()},
}

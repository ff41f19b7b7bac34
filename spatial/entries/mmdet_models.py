"""mmdetection's detectors with heads of convolutions. The detector's `forward(images)` gives the heads' maps.

Its other modes make boxes or losses of whole images: they are refused.
"""

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._functions import through
from terrazzo.spatial.entries.mmengine_model import as_tensors, refused_loss

_LOSSES = "CrossEntropyLoss FocalLoss L1Loss SmoothL1Loss IoULoss GIoULoss DIoULoss CIoULoss QualityFocalLoss"

ENTRIES = {
    "SingleStageDetector": Entry(as_tensors),
    "DetDataPreprocessor": OWN,
    **{name: Entry(through) for name in ("RetinaHead", "RetinaSepBNHead", "FCOSHead", "ATSSHead")},
    **{name: Entry(refused_loss) for name in _LOSSES.split()},
}

"""Whole mmdet detectors as one graph from raw pixels to boxes, scores, labels and masks.

mmdet's code from features to results branches on the numbers it finds, so it cannot be exported. The code here gives
the same results without these branches; the networks themselves are mmdet's.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import terrazzo.openmmlab  # noqa: F401  makes mmcv.ops ready before mmdet looks for it
from terrazzo.errors import InputError
from terrazzo.tools.export.detectors.dense import DenseReader
from terrazzo.tools.export.detectors.fixed_maps import with_fixed_maps
from terrazzo.tools.export.detectors.queries import BoxQueryReader, MaskQueryReader
from terrazzo.tools.export.detectors.regions import RegionReader


class RawDetector(nn.Module):
    """An mmdet detector that takes RGB pixels as they are and gives detections in their coordinates.

    Args:
        detector: built from a config, in evaluation mode.
        size: H, W that the graph is for.

    Raises:
        InputError: there is no code without branches for this kind of detector.
    """

    def __init__(self, detector: nn.Module, size: tuple[int, int]):
        super().__init__()
        preprocessor = detector.data_preprocessor
        # In a tuple it is not a submodule: this module has a copy of it, with other forms of some layers.
        self._original, self.size = (detector,), size
        self.detector = with_fixed_maps(detector)
        self.reader = _reader(self.detector, size)
        self.output_names = self.reader.output_names
        self.swap = not preprocessor._channel_conversion
        self.normalise = bool(preprocessor._enable_normalize)
        if self.normalise:
            self.register_buffer("mean", preprocessor.mean.detach().clone(), persistent=False)
            self.register_buffer("std", preprocessor.std.detach().clone(), persistent=False)
        down, right = (-side % preprocessor.pad_size_divisor for side in size)
        self.padding, self.pad_value = (0, right, 0, down), preprocessor.pad_value

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From (1, 3, H, W), float RGB in 0..255, to the outputs that `output_names` names."""
        # If the preprocessor does not turn BGR files into RGB, the network wants BGR.
        image = image.flip(1) if self.swap else image
        image = (image - self.mean) / self.std if self.normalise else image
        image = pad(image, self.padding, value=self.pad_value) if any(self.padding) else image
        return self.reader(self.detector.extract_feat(image))

    @torch.no_grad()
    def reference(self, image: Tensor) -> tuple[Tensor, ...]:
        """The results of mmdet's own, unchanged code for the same pixels; as `forward`."""
        from mmdet.structures import DetDataSample

        meta = {"img_shape": self.size, "ori_shape": self.size, "scale_factor": (1.0, 1.0)}
        pixels = image[0].flip(0)  # as a pipeline reads a file: BGR
        batch = {"inputs": [pixels], "data_samples": [DetDataSample(metainfo=meta)]}
        sample, named = self._original[0].test_step(batch)[0], {}
        if "boxes" in self.output_names:
            found = sample.pred_instances
            named |= {"boxes": found.bboxes, "scores": found.scores, "labels": found.labels}
        if "masks" in self.output_names:
            named["masks"] = found.masks.to(torch.uint8)
        if "segments" in self.output_names:
            named["segments"] = sample.pred_panoptic_seg.sem_seg[0]
        return tuple(named[name] for name in self.output_names)


def _reader(detector: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The module that turns the detector's feature maps into detections; InputError if there is none."""
    from mmdet.models.detectors import DetectionTransformer, MaskFormer, SingleStageDetector, TwoStageDetector

    readers = {
        MaskFormer: MaskQueryReader,
        DetectionTransformer: BoxQueryReader,
        TwoStageDetector: RegionReader,
        SingleStageDetector: DenseReader,
    }
    for kind, reader in readers.items():
        if isinstance(detector, kind) and type(detector).predict is kind.predict:
            return reader(detector, size)
    names = ", ".join(kind.__name__ for kind in readers)
    raise InputError(f"a detector of the type {type(detector).__name__} cannot be exported; {names} can")

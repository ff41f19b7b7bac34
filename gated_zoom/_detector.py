"""The gated zoom of a detector of mmdetection: the same passes, with boxes in place of logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.gated_zoom._boxes import SAME, Boxes, uncertainty, unite
from terrazzo.gated_zoom._passes import Passes
from terrazzo.gated_zoom._tiles import Grid
from terrazzo.gated_zoom._zoom import Zoom


class _Sample:
    """What a detector reads of a data sample, and writes to it; without mmengine, which need not be installed."""

    def __init__(self, size: Sequence[int]):
        size = tuple(size)
        self.metainfo = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
        self.metainfo["scale_factor"] = (1.0, 1.0)
        vars(self).update(self.metainfo)  # as mmengine's data samples have it

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


class DetectorPasses(Passes):
    """A detector of images (B, 3, H, W) that gives the `Boxes` of each image.

    Attributes:
        iou: The threshold of the detector's own NMS.

    Raises:
        InputError: The detector gives masks.
    """

    def __init__(self, model: Callable[[Tensor], Any], features: str | None = None):
        super().__init__(model, features)
        if getattr(model, "with_mask", False) or hasattr(model, "panoptic_fusion_head"):
            raise InputError(
                f"a {type(model).__name__} gives masks, and a zoom of a detector unites boxes alone: take a detector "
                "without masks"
            )
        self.iou = _nms_iou(getattr(model, "test_cfg", None) or {})
        self.predict = model.predict  # the detector's own, also after `install`
        self.container: type | None = None  # mmengine's class for a picture's boxes, known after a pass

    def forward(self, images: Tensor) -> list[Boxes]:
        """The boxes of images (B, 3, H, W)."""
        found = self.predict(images, [_Sample(images.shape[2:]) for _ in images], rescale=False)
        instances = [sample.pred_instances for sample in found]
        self.container = type(instances[0])
        return [Boxes(each.bboxes, each.scores, each.labels) for each in instances]


class ZoomDetector(Zoom):
    """A detector that looks twice where it pays; see `terrazzo.zoom`, which makes it."""

    kind = DetectorPasses
    untrained = ("uncertainty",)

    def install(self) -> nn.Module:
        """Make the detector predict with this zoom, in place; the detector is returned."""
        self.passes.model.predict = self._predict
        return self.passes.model

    def _predict(self, images: Tensor, samples: Sequence[Any], rescale: bool = True) -> Any:
        """`predict` of a detector of mmdetection, with this zoom."""
        return self.predictions(self(images), samples, rescale)

    def predictions(self, result: list[Boxes], samples: Sequence[Any], rescale: bool = True) -> Sequence[Any]:
        """The data samples of OpenMMLab with the boxes of a result, by default in the pictures' own size."""
        for sample, found in zip(samples, result):
            boxes = found.boxes
            height, width = sample.metainfo["img_shape"][:2]
            boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], 2).flatten(1)
            if rescale:
                boxes = boxes / boxes.new_tensor(sample.metainfo["scale_factor"]).repeat(2)
            sample.pred_instances = self.passes.container(bboxes=boxes, scores=found.scores, labels=found.labels)
        return samples

    def in_place(self, result: list[Boxes], small: Tensor, images: Tensor) -> list[Boxes]:
        factors = [images.shape[side] / small.shape[side] for side in (3, 2)] * 2
        return [found._replace(boxes=found.boxes * found.boxes.new_tensor(factors)) for found in result]

    def _check_refinement(self) -> None:
        """A refinement is of logits."""
        if self.refine:
            raise InputError(
                f"refine=True corrects the logits of segmentors, and a {type(self.passes.model).__name__} gives boxes"
            )

    def full_size(self, result: list[Boxes], grid: Grid) -> list[Boxes]:
        return result

    def untrained_scores(self, result: list[Boxes], grid: Grid, name: str | None = None) -> Tensor:
        if (name or self.score) == "random":
            return torch.rand(len(result), grid.rows, grid.columns, device=result[0].scores.device)
        return torch.stack([uncertainty(found, grid) for found in result])

    def united(
        self, coarse: list[Boxes], fine: Sequence[Sequence[Boxes]], grid: Grid, chosen: Sequence[Sequence[int]]
    ) -> list[Boxes]:
        return [unite(found, crops, grid, tiles, self.passes.iou) for found, crops, tiles in zip(coarse, fine, chosen)]


def _nms_iou(test_cfg: Mapping[str, Any]) -> float:
    """The IoU of the NMS in a detector's `test_cfg`, of the second stage if there are two; without NMS it is `SAME`."""
    nms = test_cfg.get("rcnn", test_cfg).get("nms") or {}
    return nms.get("iou_threshold", SAME)

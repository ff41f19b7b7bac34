"""What the fine pass corrects in each tile by the annotation: the order of tiles of an oracle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from terrazzo.errors import InputError
from terrazzo.gated_zoom import Boxes, Grid, Zoom
from terrazzo.gated_zoom._boxes import recovered
from terrazzo.gated_zoom._detector import ZoomDetector
from terrazzo.gated_zoom._labels import gain


def gains(
    zoom: Zoom, inputs: Tensor, samples: Sequence[Any], grid: Grid, coarse: Any, fine: Sequence[Sequence[Any]]
) -> Tensor:
    """By how much a fine pass improves each tile, (B, rows, columns).

    For a segmentor this is the share of a tile's pixels that it corrects, less the share that it spoils, or 0 if it
    spoils more. For a detector it is the number of annotated boxes that the coarse pass misses and the fine pass finds.

    Args:
        zoom: The model's zoom.
        inputs: B 3 H W.
        samples: B data samples with the annotation, in the pictures' own size.
        grid: The tiles.
        coarse: The result of the coarse pass, in the size of the inputs.
        fine: For each picture the results of all tiles.

    Raises:
        InputError: The data has no annotation.
    """
    is_detector = isinstance(zoom, ZoomDetector)
    name, kind = ("gt_instances", "boxes") if is_detector else ("gt_sem_seg", "label maps")
    if not samples or name not in samples[0]:
        raise InputError(f"a sweep compares with the annotation, and the test data has no {kind}")
    if is_detector:
        parts = zip(coarse, fine, samples)
        return torch.stack([recovered(found, crops, _boxes(sample, found), grid) for found, crops, sample in parts])
    whole = zoom.united(coarse, fine, grid, [list(range(grid.count))] * len(inputs))
    ignored = zoom.passes.model.decode_head.ignore_index
    return gain(coarse, whole, _classes(samples, inputs), grid, ignored, zoom.passes.threshold)


def _boxes(sample: Any, like: Boxes) -> Boxes:
    """The annotated boxes of a picture in its inputs; mmdetection's metrics have them in the picture's own size."""
    truth = sample.gt_instances
    boxes = getattr(truth.bboxes, "tensor", truth.bboxes).to(like.boxes)
    boxes = boxes * boxes.new_tensor(sample.metainfo["scale_factor"]).repeat(2)
    return Boxes(boxes, boxes.new_ones(len(boxes)), truth.labels.to(like.labels))


def _classes(samples: Sequence[Any], inputs: Tensor) -> Tensor:
    """The annotated classes (B, H, W) in the size of the inputs."""
    maps = [sample.gt_sem_seg.data[None].float() for sample in samples]
    same = [F.interpolate(labels, inputs.shape[2:], mode="nearest-exact")[0, 0].long() for labels in maps]
    return torch.stack(same).to(inputs.device)

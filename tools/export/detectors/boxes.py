"""Boxes inside an exported graph: decoding, thresholds and non-maximum suppression, as mmdet and mmcv do them."""

import math

import torch
from torch import Tensor, nn

from terrazzo.errors import InputError

_NMS_SETTINGS = {"type", "iou_threshold", "class_agnostic", "split_thr"}


def decoded(coder: nn.Module, priors: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes from a head's predictions, as `coder.decode` gives them.

    Args:
        coder: a coder that `check_coder` accepts.
        priors: N x 4 boxes, or N x 2 points of a `DistancePointBBoxCoder`.
        offsets: N x 4.
        size: H, W of the image; boxes are cut off there if the coder says so.

    Returns:
        N x 4, x1 y1 x2 y2 in pixels.
    """
    if type(coder).__name__ == "DistancePointBBoxCoder":
        corners = priors - offsets[:, :2], priors + offsets[:, 2:]
    else:
        offsets = offsets * offsets.new_tensor(coder.stds) + offsets.new_tensor(coder.means)
        centres, extents = (priors[:, :2] + priors[:, 2:]) * 0.5, priors[:, 2:] - priors[:, :2]
        shift, growth = extents * offsets[:, :2], offsets[:, 2:]
        limit = abs(math.log(16 / 1000))  # the default of mmdet's `decode`, which no config can set
        if coder.add_ctr_clamp:
            shift, growth = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp), growth.clamp(max=limit)
        else:
            growth = growth.clamp(-limit, limit)
        centres, extents = centres + shift, extents * growth.exp()
        corners = centres - extents * 0.5, centres + extents * 0.5
    boxes = torch.cat(corners, dim=1)
    return clipped(boxes, size) if coder.clip_border else boxes


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) cut off at the borders of an image of size H, W."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def check_coder(coder: nn.Module) -> None:
    """InputError unless `decoded` knows how boxes are coded."""
    known = ("DeltaXYWHBBoxCoder", "DistancePointBBoxCoder")
    if type(coder).__name__ not in known:
        raise InputError(f"boxes coded by {type(coder).__name__} cannot be exported; {' or '.join(known)} can be")


def check_nms(settings: dict) -> None:
    """InputError unless `kept` does what these settings of mmcv's `batched_nms` say."""
    kind = settings.get("type", "nms")
    if kind != "nms":
        raise InputError(f"ONNX has no operator for non-maximum suppression of the type {kind!r}; set nms.type=nms")
    unknown = set(settings) - _NMS_SETTINGS
    if unknown:
        raise InputError(f"nms with {', '.join(sorted(unknown))} cannot be exported; leave that out of test_cfg")


def kept(boxes: Tensor, scores: Tensor, groups: Tensor, settings: dict) -> Tensor:
    """Non-maximum suppression within groups, as mmcv's `batched_nms`: groups are moved apart and run at once.

    Above `split_thr` boxes mmcv runs group by group, which finds the same boxes; only ties are in another order.

    Args:
        boxes: N x 4; N may be 0.
        scores: N.
        groups: N, such as labels.
        settings: `iou_threshold`, and whether it is `class_agnostic`.

    Returns:
        Indices of the kept boxes, by descending score.
    """
    if not settings.get("class_agnostic", False):
        # without boxes there is no largest coordinate, and the operator that looks for it needs an element
        largest = torch.cat([boxes.flatten(), boxes.new_full((1,), -math.inf)]).max()
        boxes = boxes + (groups.to(boxes.dtype) * (largest + 1))[:, None]
    keep = torch.ops.torchvision.nms(boxes, scores, float(settings["iou_threshold"]))
    torch._check(keep.shape[0] <= boxes.shape[0])
    return keep


def coordinates(condition: Tensor) -> Tensor:
    """Indices (N, axes) where a condition holds, computed on floats: TensorRT has the operator only for floats."""
    return condition.float().nonzero()


def places(condition: Tensor) -> Tensor:
    """Indices (N) where a one-dimensional condition holds."""
    return coordinates(condition).squeeze(1)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of N scores, or all, by descending score, and their indices. N must be known to the graph."""
    return scores.topk(min(count, scores.shape[0]))


def divided(numbers: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotients and remainders of non-negative numbers, up to the size of any index into a map.

    `//` becomes a comparison of booleans in ONNX, which TensorRT does not have. This becomes a division in float32. Its
    whole part may be off by one, and is then corrected.
    """
    whole = torch.div(numbers, by, rounding_mode="trunc")
    rest = numbers - whole * by
    off = (rest >= by).long() - (rest < 0).long()
    return whole + off, rest - off * by

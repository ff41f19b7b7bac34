"""The label map of an image whose rows several ranks share, by an mmsegmentation segmentor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial import Level, Part, rows
from terrazzo.spatial._operators import resize

BILINEAR = "bilinear"


def is_segmentor(model: nn.Module) -> bool:
    """Whether a model is an `EncoderDecoder` of mmsegmentation, which the bridge does not import."""
    return any(
        kind.__name__ == "EncoderDecoder" and kind.__module__.startswith("mmseg.") for kind in type(model).__mro__
    )


def unpredictable(model: nn.Module) -> str | None:
    """Why `own_labels` does not do what a model does in its place; None if it does."""
    if not is_segmentor(model) or type(model).encode_decode.__qualname__ != "EncoderDecoder.encode_decode":
        return f"the model is a {type(model).__name__}, and only segmentors (EncoderDecoder) share images"
    if type(model.decode_head).predict_by_feat.__qualname__ != "BaseDecodeHead.predict_by_feat":
        return f"the head is a {type(model.decode_head).__name__}, which overrides predict_by_feat"
    if model.test_cfg.get("mode", "whole") != "whole":
        return "model.test_cfg has mode slide, which cuts images into windows; set its mode to whole"
    return None


@torch.no_grad()
def own_labels(part: Part, model: nn.Module, images: torch.Tensor, metas: Sequence[Mapping[str, Any]]) -> list:
    """What `EncoderDecoder.predict` finds, for the own rows.

    Args:
        part: The images; modules of the model were replaced (`terrazzo.spatial`).
        images: The own rows (B, 3, h, W) of the prepared images.
        metas: What their samples say about each.

    Returns:
        For each image class indices (1, h, W): rows of the image before its preparation, `label_rows` says which.
    """
    with part.entered():
        logits = model(images)
    head, align = model.decode_head, model.align_corners
    prepared = metas[0].get("pad_shape", metas[0]["img_shape"])[:2]
    logits = resize(part, logits, (int(prepared[0]), int(prepared[1])), BILINEAR, align)
    level = part.level(logits)
    found = []
    for own, meta in zip(logits.split(1), metas):
        own = _as_before(part, own, level, meta, align)
        own = own.argmax(1) if head.out_channels > 1 else (own.sigmoid() > head.threshold).long()[:, 0]
        found.append(own)
    return found


def label_rows(meta: Mapping[str, Any], ranks: int) -> tuple[tuple[int, int], ...]:
    """For each rank, its first row of an image's label map and the row after its last row."""
    return rows(meta["ori_shape"][0], ranks, 1)


def _as_before(part: Part, logits: torch.Tensor, level: Level, meta: Mapping[str, Any], align: bool) -> torch.Tensor:
    """Logits without padding and flips, in the size of the image before its preparation; new rows for each rank."""
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    height, width = level.height - top - bottom, level.width - left - right
    if meta.get("flip") and meta.get("flip_direction") != "horizontal":
        raise InputError("vertically flipped images cannot be shared across ranks")
    ranks = part.group.size
    inner = Level(width, rows(height, ranks, 1))
    logits = part.exchange(logits, 2, level, [(start + top, end + top) for start, end in inner.rows])
    logits = logits[..., left : left + width]
    if meta.get("flip"):
        logits = logits.flip(3)
    size = tuple(meta["ori_shape"][:2])
    if size == (height, width):
        return logits
    return resize(part, logits, size, BILINEAR, align, levels=(inner, Level(size[1], label_rows(meta, ranks))))

"""Calling a model for a pass: its logits in the size of the images, and a map of its features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.gated_zoom._fusion import enlarged

FINEST = 8
"""The least stride of the features that the heads see."""


class Passes(nn.Module):
    """A model of images (B, 3, H, W) that gives logits (B, classes, H, W).

    Args:
        model: A segmentor of mmsegmentation, or a callable from images to logits; smaller logits are enlarged.
        features: The name of the module whose output has the features for the heads; by default "backbone", if the
            model has one. From several maps, the map with the least stride from 8 is taken.

    Attributes:
        threshold: The probability above which a segmentor of one channel predicts its foreground.

    Raises:
        InputError: `model` cannot be called, or has no module of that name.
    """

    def __init__(self, model: Callable[[Tensor], Any], features: str | None = None):
        super().__init__()
        if not callable(model):
            raise InputError(f"a {type(model).__name__} is not a model: give a segmentor or a function of images")
        self.model: Any = model
        self.is_segmentor = hasattr(model, "encode_decode")
        self.source = _source(model, features)
        threshold = getattr(getattr(model, "decode_head", None), "threshold", None)  # None for several channels
        self.threshold: float = 0.5 if threshold is None else threshold

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W)."""
        size = images.shape[2:]
        if self.is_segmentor:
            meta = dict(img_shape=size, ori_shape=size, pad_shape=size, padding_size=[0] * 4)
            logits = self.model.encode_decode(images, [dict(meta) for _ in images])
        else:
            logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 4 or len(logits) != len(images):
            raise InputError(
                f"the model gives {_said(logits)} for images {tuple(images.shape)}; a zoom needs logits "
                "(images, classes, height, width)"
            )
        return enlarged(logits, size)

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and features (B, C, h, w); None for a model without a module that has features."""
        if self.source is None:
            return self(images), None
        seen: list[Any] = []
        handle = self.source.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            logits = self(images)
        finally:
            handle.remove()
        return logits, _chosen(seen[-1], images) if seen else None


def is_detector(model: Any) -> bool:
    """Whether a model is a detector of mmdetection."""
    return hasattr(model, "predict") and (hasattr(model, "bbox_head") or hasattr(model, "roi_head"))


def _source(model: Any, name: str | None) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        if name is not None:
            raise InputError(f"features={name!r} names a module, and a {type(model).__name__} has no modules")
        return None
    try:
        return model.get_submodule(name or "backbone")
    except AttributeError:
        if name is None:
            return None
        raise InputError(f"features={name!r} is no module of a {type(model).__name__}") from None


def _chosen(output: Any, images: Tensor) -> Tensor:
    maps: Sequence[Any] = [output]
    if isinstance(output, Mapping):
        maps = list(output.values())
    elif isinstance(output, (list, tuple)):
        maps = output
    maps = [x for x in maps if isinstance(x, Tensor) and x.dim() == 4]
    if not maps:
        raise InputError(f"the features are {_said(output)}; the heads of a zoom need maps (images, channels, h, w)")
    coarse = [x for x in maps if images.shape[2] >= FINEST * x.shape[2] - FINEST + 1]
    return max(coarse, key=lambda x: x.shape[2]) if coarse else min(maps, key=lambda x: x.shape[2])


def _said(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"

"""Axial-VS in mmdetection's video models: a pixel decoder for clips, and heads for clips and whole videos.

Configs name the classes below. They are built on mmdet's classes, and `terrazzo.openmmlab` does not import mmdet. So a
function is registered for each class, which imports the class when a model is built.
"""

import importlib
from typing import Any

from mmengine.registry import MODELS
from torch import nn

CLASSES = {
    "AxialTrajectoryPixelDecoder": "pixel_decoder",
    "ClipTrackHead": "track_head",
    "CrossClipTrackHead": "cross_clip_head",
    "CrossClipVideo": "video",
}
"""The module of each class."""


def _register(name: str, module: str) -> None:
    def build(**settings: Any) -> nn.Module:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(**settings)

    build.__name__ = build.__qualname__ = name
    MODELS.register_module(module=build)


def register() -> None:
    """Register all classes with mmengine's root registry of models."""
    for name, module in CLASSES.items():
        _register(name, module)

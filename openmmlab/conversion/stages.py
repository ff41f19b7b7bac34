"""Stages of a conversion: the interface, and where each stage is."""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from terrazzo.errors import InputError

if TYPE_CHECKING:
    from terrazzo.openmmlab.conversion.model import AttentionConversion

STAGES = {
    "matrix": ("layerwise", "MatrixStage"),
    "hidden": ("layerwise", "HiddenStage"),
    "select": ("selection", "SelectStage"),
    "distil": ("distil", "DistilStage"),
}
"""For each stage its file in this folder and its class."""


class Stage:
    """What a stage trains, and what it compares.

    A stage has no weights of its own in checkpoints. If it needs parameters, it registers them on the student in
    `prepare`.
    """

    def prepare(self, model: "AttentionConversion") -> None:
        """Check that the stage can train a model, and change its student where the stage needs it.

        The model calls this once, before it shares memory between student and teacher.

        Raises:
            InputError: The stage cannot train this model.
        """

    def trained(self, model: "AttentionConversion") -> Iterator[nn.Parameter]:
        """The student's parameters that the stage trains; all others are frozen."""
        raise NotImplementedError

    def losses(
        self, model: "AttentionConversion", images: Tensor, labels: Tensor | None, progress: float
    ) -> dict[str, Tensor]:
        """The terms of a step.

        Args:
            model: The model.
            images: (B, 3, H, W).
            labels: (B,), the classes of the images; None for images without labels.
            progress: The share of the training's steps that are done, 0 to 1.

        Returns:
            Terms whose names have "loss" in them, which add up to the loss, and other numbers for the log.
        """
        raise NotImplementedError

    def done(self, model: "AttentionConversion", progress: float) -> bool:
        """Whether the training may end before its last step; every process must give the same answer."""
        return False

    def finished(self, model: "AttentionConversion") -> nn.Module | None:
        """A copy of the student as the stage leaves it; None if checkpoints have that student already."""
        return None

    def report(self, model: "AttentionConversion") -> str:
        """What the log says about the finished student."""
        return ""


def make_stage(stage: str | Mapping[str, Any]) -> Stage:
    """Make a stage from its name, or from its name as `type` and its options.

    Raises:
        InputError: No stage has this name, it has no option of a given name, or an option's value is not valid.
    """
    options = {"type": stage} if isinstance(stage, str) else dict(stage or {})
    options.pop("_scope_", None)
    name = options.pop("type", None)
    if name not in STAGES:
        raise InputError(f"stage must be one of {', '.join(STAGES)}, got {name!r}")
    file, kind = STAGES[name]
    try:
        return getattr(importlib.import_module(f"terrazzo.openmmlab.conversion.{file}"), kind)(**options)
    except TypeError as error:
        raise InputError(f"stage {name!r} does not fit: {error}") from error

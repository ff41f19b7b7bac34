"""Hierarchical backbones: a stem of stride 4 (or another stride), then stages, each with half the resolution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._backbone import Backbone
from terrazzo.backbones._dilation import dilate
from terrazzo.backbones._states import run
from terrazzo.errors import InputError

OUTPUT_STRIDES = (8, 16, 32)
"""What the largest stride of a pyramid may be."""


class Stage(nn.Module):
    """A downsampler, then blocks.

    The downsampler opens a stage (in official code it often closes the stage before), so the stage's output is the
    feature.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None):
        """Args:
        downsample: Fits the map to the stage; None for no change.
        """
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        return self.run(self.downsample(x), state)

    def run(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        """Run the blocks alone."""
        for block in self.blocks:
            x = run(block, x, state, self.grad_checkpointing)
        return x


class Pyramid(Backbone):
    """A backbone whose units are stages, each with half the resolution of the stage before.

    Attributes:
        dilates: Whether the family's last stages can keep the size of their map (`terrazzo.backbones._dilation`).
    """

    units_name = "stages"
    dilates = False

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        stem_stride: int = 4,
        output_stride: int = 32,
        **kwargs,
    ):
        """Args:
        output_stride: 8, 16 or 32. Stages that would have a larger stride keep this one, with dilated layers; weights
            are the same.
        **kwargs: See `Backbone`.

        Raises:
            InputError: `output_stride` is another number, or the family has no dilated form.
        """
        if output_stride not in OUTPUT_STRIDES:
            raise InputError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
        if output_stride < 32 and not self.dilates:
            raise InputError(
                f"{type(self).__name__} has layers without a dilated form: output_stride must be 32, got "
                f"{output_stride}; take another family, such as dinat or vmamba"
            )
        strides = [stem_stride * 2**i for i in range(len(stages))]
        super().__init__(stem, stages, channels, [min(stride, output_stride) for stride in strides], **kwargs)
        for stage, stride in zip(stages, strides):
            if stride > output_stride:
                dilate(stage, stride // output_stride // 2, stride // output_stride)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from stem to head, for layer-wise learning rate decay."""
        blocks = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.(?!blocks\.)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm\d*", (99999,)),
            ]
        return dict(stem=r"^stem", blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

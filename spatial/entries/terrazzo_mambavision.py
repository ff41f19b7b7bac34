"""MambaVision: convolutions, then windows."""

import torch
from torch import nn

from terrazzo.backbones._bare import on_few_positions
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._windows import windows


def _on_windows(part: Part, stage: nn.Module, x: torch.Tensor, state: object = None) -> torch.Tensor:
    x = on_few_positions(stage.downsample, x.permute(0, 2, 3, 1))
    level = part.level(x, 1)
    whole = (level.height, level.width)
    side = min(stage.window_size, level.height) if stage.fit_windows else stage.window_size
    x = part.extended(x, 1, level, windows(level, side), lambda rows: stage.on_windows(rows, whole))
    return x.permute(0, 3, 1, 2)


ENTRIES = {
    **dict.fromkeys(("MambaVision", "ConvBlock"), OWN),
    "WindowStage": Entry(_on_windows, kept=("blocks",)),
}

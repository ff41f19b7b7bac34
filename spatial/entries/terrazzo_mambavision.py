"""MambaVision: convolutions, then windows."""

import torch
from torch import nn

from terrazzo.backbones._bare import on_few_positions
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part
from terrazzo.spatial._windows import windows


def _on_windows(part: Part, stage: nn.Module, x: torch.Tensor, state: object = None) -> torch.Tensor:
    x = on_few_positions(stage.downsample, x.permute(0, 2, 3, 1))
    level = part.level(x, 1)
    whole = (level.height, level.width)
    side = min(stage.window_size, level.height) if stage.fit_windows else stage.window_size
    x = part.extended(x, 1, level, windows(level, side), lambda rows: stage.on_windows(rows, whole))
    return x.permute(0, 3, 1, 2)


def _update(part: Part, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Both convolutions on some more rows, so that nothing but the block's input waits for other ranks."""
    if block.training:  # the statistics of batch norm are of own rows alone
        return type(block).update(block, x)
    level, around = part.level(x), block.conv1.padding[0] + block.conv2.padding[0]
    needs = [(start - around, end + around) for start, end in level.rows]

    def run(rows: torch.Tensor) -> torch.Tensor:
        rows = block.act(own(block.norm1, own(block.conv1, rows)))
        return own(block.norm2, own(block.conv2, rows))

    return part.extended(x, 2, level, needs, run)


ENTRIES = {
    "MambaVision": OWN,
    "ConvBlock": Entry(_update, method="update"),
    "WindowStage": Entry(_on_windows, kept=("blocks",)),
}

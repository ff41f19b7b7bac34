"""timm's Swin: windows, and windows of a map that is shifted around its ends."""

import torch
from torch import nn

from terrazzo.backbones._layers import join_windows, split_windows
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._windows import windows


def _regions(first: int, last: int, length: int, window: int, shift: int, like: torch.Tensor) -> torch.Tensor:
    """Which of three regions positions of the padded, shifted map belong to; windows mix within a region only."""
    place = torch.arange(first, last, device=like.device)
    padded = -(-length // window) * window
    return (place >= padded - window).long() + (place >= padded - shift).long()


def _attend(part: Part, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    level = part.level(x, 1)
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    if shift[0]:
        x = part.rolled(x, 1, level, -shift[0])
    if shift[1]:
        x = x.roll(-shift[1], 2)
    needs = windows(level, window[0])

    def run(rows: torch.Tensor) -> torch.Tensor:
        first = needs[part.rank][0]
        parted = split_windows(rows, window)  # B rows columns h w C
        mask = None
        if any(shift):
            last = first + parted.shape[1] * window[0]
            down = _regions(first, last, level.height, window[0], shift[0], x)
            across = _regions(0, parted.shape[2] * window[1], level.width, window[1], shift[1], x)
            regions = split_windows((3 * down[:, None] + across)[None, :, :, None], window).flatten(0, 2).flatten(1)
            # As in timm, -100 and not -inf.
            mask = (regions[:, None] != regions[:, :, None]).to(x.dtype) * -100.0
        out = block.attn(parted.flatten(3, 4).flatten(0, 2), mask=mask)
        return join_windows(out.view(parted.shape), tuple(rows.shape[1:3]))

    y = part.extended(x, 1, level, needs, run)
    if shift[1]:
        y = y.roll(shift[1], 2)
    return part.rolled(y, 1, level, shift[0]) if shift[0] else y


def _merge(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Patches of 2x2 pixels; a rank's rows are even, but for the last rank's, where zeros are padded."""
    level = part.level(x, 1)
    part.strided(level, 2, -(-level.height // 2), -(-level.width // 2))
    return type(module).forward(module, x)


ENTRIES = {
    **dict.fromkeys(("SwinTransformer", "SwinTransformerStage"), OWN),
    "SwinTransformerBlock": Entry(_attend, method="_attn", kept=("attn",)),
    "PatchMerging": Entry(_merge),
}

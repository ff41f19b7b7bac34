"""VMamba."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.terrazzo_ss2d import scan


def _scanned(part: Part, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """SS2D whose norm, projection and convolution run on some more rows: only the map before and after them waits."""
    op, level = block.op, part.level(x, 1)
    around = op.conv2d.padding[0]
    needs = [(start - around, end + around) for start, end in level.rows]

    def run(rows: torch.Tensor) -> torch.Tensor:
        y, gate = op.entered(block.norm(rows))
        return y if gate is None else torch.cat([y, gate], -1)

    y = part.extended(x, 1, level, needs, run)
    y, gate = y.chunk(2, -1) if op.gated else (y, None)
    return op.left(scan(part, op, y), gate, y.dtype)


ENTRIES = {
    **dict.fromkeys(("VMamba", "Stem"), OWN),
    "VSSBlock": Entry(_scanned, method="scanned", kept=("op",)),
}

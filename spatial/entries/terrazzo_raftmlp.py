"""RaftMLP: blocks mix tokens on a map of a fixed size, which every rank gets as a whole."""

from types import SimpleNamespace

import torch
from torch import nn

from terrazzo.backbones._layers import bicubic
from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import convolve
from terrazzo.spatial._part import Part


def _embed(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Overlapping patches are a convolution."""
    level, stride, side = part.level(x), module.stride, max(module.kernels)
    if level.height % stride or level.width % stride:
        raise InputError(
            f"{part.at} resizes a map of {level} to whole patches of {stride}, which is not done across ranks: use "
            "images whose sides are multiples of the model's stride"
        )
    conv = SimpleNamespace(
        weight=module.kernel(),
        bias=module.proj.bias,
        kernel_size=(side, side),
        stride=(stride, stride),
        padding=((side - stride) // 2,) * 2,
        dilation=(1, 1),
        groups=1,
    )
    return convolve(part, conv, x).permute(0, 2, 3, 1)


def _embed_map(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _embed(part, module, x.permute(0, 3, 1, 2))


def _mix(part: Part, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    level = part.level(x, 1)
    first, last = level.rows[part.rank]
    size = (level.height, level.width)
    rows, columns = (bicubic(old, new, x) for old, new in zip(size, block.grid))
    x = part.total((rows[:, first:last] @ (columns @ x).flatten(2)).unflatten(2, (block.grid[1], -1)))
    x = block.mix_w(block.mix_h(x))
    rows, columns = (bicubic(old, new, x) for old, new in zip(block.grid, size))
    return (rows[first:last] @ (columns @ x).flatten(2)).unflatten(2, (level.width, -1))


ENTRIES = {
    "RaftMLP": OWN,
    "Block": Entry(_mix, method="mixed", kept=("mix_h", "mix_w")),
    "Embedding": Entry(_embed, kept=("*",)),
    "DownsamplingEmbedding": Entry(_embed_map, kept=("*",)),
}

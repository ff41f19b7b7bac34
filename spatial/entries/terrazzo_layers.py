"""The layers that several families of the zoo share."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import convolve
from terrazzo.spatial._part import Part


def _patches(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Patches of an image that is padded with zeros below and on the right."""
    excess = (module.patch_size - 1,) * 2
    return module.norm(convolve(part, module.proj, x, excess).permute(0, 2, 3, 1))


def merge(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Patches of 2x2 pixels; a rank's rows are even, but for the last rank's, where zeros are padded."""
    level = part.level(x, 1)
    part.strided(level, 2, -(-level.height // 2), -(-level.width // 2))
    return type(module).forward(module, x)


def check_merge(module: nn.Module) -> str | None:
    return None if module.step is None else "a patch merging that keeps the size (output_stride) is not done yet"


ENTRIES = {
    **dict.fromkeys(("WideLayerNorm", "ConvDownsampler"), OWN),
    "PatchEmbed": Entry(_patches, kept=("proj",)),
    "PatchMerging": Entry(merge, check=check_merge),
}

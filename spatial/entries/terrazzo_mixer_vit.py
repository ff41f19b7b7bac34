"""The plain ViT and the pyramid for any mixer."""

import torch
from torch import nn

from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part


def _placed(part: Part, block: nn.Module, x: torch.Tensor, state: None = None) -> torch.Tensor:
    part.tokens, part.prefix = part.level(x, 1), 0
    return own(block, x)


ENTRIES = {**dict.fromkeys(("MixerViT", "MixerPyramid", "ConvStem"), OWN), "PlacedBlock": Entry(_placed)}

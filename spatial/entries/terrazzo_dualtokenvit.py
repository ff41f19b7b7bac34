"""DualToken-ViT: every rank has the global tokens."""

import torch
from torch import nn

from terrazzo.backbones._layers import on_maps
from terrazzo.backbones.dualtokenvit import GRID
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import adaptive_average
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.terrazzo_layers import check_merge, merge


def _pooled(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = on_maps(x, *module.halvings).permute(0, 3, 1, 2)
    return adaptive_average(part, x, (GRID, GRID)).flatten(2).transpose(1, 2)


def _mean(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part.mean(x, 1)


_OWN = (
    *("DualTokenViT", "DualTokenStage", "DualTokenBlock", "Stem", "ConvEncoder", "HalvingStep", "MixMlp"),
    *("TokenMerging", "AllTokensHead"),
)
ENTRIES = {
    **dict.fromkeys(_OWN, OWN),
    "PositionAwareTokens": Entry(_pooled, method="pooled"),
    "BiDimAttention": Entry(_mean, method="mean"),
    "LightPatchMerging": Entry(merge, check=check_merge),
}

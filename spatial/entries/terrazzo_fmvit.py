"""FMViT: convolutions, and attention to averages of the map."""

import torch
from torch import nn

from terrazzo.spatial._attention import attention
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part


def _attend(
    part: Part, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fewer: torch.Tensor
) -> torch.Tensor:
    level = part.level(fewer)
    counts = [(end - start) * level.width for start, end in level.rows]
    return attention(part, query, key, value, counts, None)


_OWN = "FMViT ConvFusionBlock FrequencyFusionBlock StemConv ConvNorm GroupedMlp Mix FeedForward PatchEmbed"
ENTRIES = {**dict.fromkeys(_OWN.split(), OWN), "Attention": Entry(_attend, method="attended")}

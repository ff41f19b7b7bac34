"""timm's blocks and attention in ViTs with mixers: `terrazzo.convert_attention`, and the families of mixers."""

from typing import Any

import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._operators import own
from terrazzo.spatial._part import Part
from terrazzo.spatial.entries.timm_layers import attend_to_all


def _attend(
    part: Part, module: nn.Module, x: torch.Tensor, rope: Any = None, attn_mask: Any = None, attend: Any = None, **_
) -> torch.Tensor:
    """Softmax attention to all ranks' tokens, or a mixer, which has an entry of its own."""
    if rope is not None or attend is not None:
        raise InputError(f"{part.at} has rotary positions or a reducer's attention, which is not done across ranks")
    return attend_to_all(part, module, x) if module.mixer is None else own(module, x, attn_mask=attn_mask)


ENTRIES = {"HostedBlock": OWN, "HostedAttention": Entry(_attend)}

"""timm's plain ViT block, which a reducer may run: called as ever, its parts called by the reducer."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

Attend = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""From the attention module and its input (B, N, C) to what each token is given, heads side by side, (B, M, C)."""


class ReducibleAttention(Attention):
    """timm's attention, whose inner part may be replaced."""

    def forward(self, x: torch.Tensor, *args: Any, attend: Any = None, **kwargs: Any) -> torch.Tensor:
        """As timm's, but for `attend` (see `Attend`)."""
        if attend is None:
            return super().forward(x, *args, **kwargs)
        return self.proj_drop(self.proj(self.norm(attend(self, x))))


class ReducibleBlock(Block):
    """timm's block; beside a state it is run by the reducer of that state."""

    def forward(self, x: torch.Tensor, state: Any = None, **kwargs: Any) -> torch.Tensor:
        """Tokens (B, T, C) to as many as the reducer leaves.

        Args:
            state: A `_tokens.State`; None for timm's block as it is.
            **kwargs: Of timm's block alone.
        """
        if state is None:
            return super().forward(x, **kwargs)
        x = state.reducer(self, x, state)
        state.depth += 1
        return x


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's plain one, of a kind that can be made reducible."""
    attn = getattr(block, "attn", None)
    plain = type(block) in (Block, ReducibleBlock) and type(attn) in (Attention, ReducibleAttention)
    return plain and getattr(attn, "gate", None) is None


def reducible(block: Block) -> ReducibleBlock:
    """The block itself, which is of another class from now on; nothing else of it changes."""
    block.__class__ = ReducibleBlock
    block.attn.__class__ = ReducibleAttention
    return block


def heads(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, N, parts C) to parts of (B, heads, N, D)."""
    return x.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()


def attended(block: nn.Module, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    """What a block's attention adds to the tokens, with its inner part replaced."""
    return block.drop_path1(block.ls1(block.attn(block.norm1(x), attend=attend)))


def widened(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The rest of a block, behind attention."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

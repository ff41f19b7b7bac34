"""timm's plain ViT block, extended so that a reducer can run it: callers call the block, the reducer its parts."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

Attend = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Maps the attention module and its input (B, N, C) to the attention's output, heads side by side, (B, M, C)."""


class ReducibleAttention(Attention):
    """timm's attention with a replaceable inner part."""

    def forward(self, x: torch.Tensor, *args: Any, attend: Any = None, **kwargs: Any) -> torch.Tensor:
        """Like timm's forward, with `attend` (see `Attend`) as the inner part if it is given."""
        if attend is None:
            return super().forward(x, *args, **kwargs)
        return self.proj_drop(self.proj(self.norm(attend(self, x))))


class ReducibleBlock(Block):
    """timm's block. With a state, the state's reducer runs it."""

    def forward(self, x: torch.Tensor, state: Any = None, **kwargs: Any) -> torch.Tensor:
        """Tokens (B, T, C) to the tokens that the reducer leaves.

        Args:
            state: A `_tokens.State`; None for timm's unchanged block.
            **kwargs: Arguments of timm's block, without a state only.
        """
        if state is None:
            return super().forward(x, **kwargs)
        x = state.reducer(self, x, state)
        state.depth += 1
        return x


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's plain block with plain attention, which can be made reducible."""
    attn = getattr(block, "attn", None)
    plain = type(block) in (Block, ReducibleBlock) and type(attn) in (Attention, ReducibleAttention)
    return plain and getattr(attn, "gate", None) is None


def reducible(block: Block) -> ReducibleBlock:
    """Change the classes of a block and of its attention in place, and return the block. Nothing else changes."""
    block.__class__ = ReducibleBlock
    block.attn.__class__ = ReducibleAttention
    return block


def heads(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split (B, N, parts C) into parts (B, heads, N, D)."""
    return x.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()


def attended(block: nn.Module, x: torch.Tensor, attend: Attend) -> torch.Tensor:
    """The residual of a block's attention, with its inner part replaced."""
    return block.drop_path1(block.ls1(block.attn(block.norm1(x), attend=attend)))


def widened(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The rest of a block, after attention."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

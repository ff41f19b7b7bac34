"""Reducers that act between a block's attention and its MLP, where the block's queries and keys are known."""

from abc import abstractmethod

import torch
from torch import nn

from terrazzo.backbones._tokens import Reducer, TokenState
from terrazzo.kernels.dispatch import opaque


class Between(Reducer):
    """Runs a block's attention on all tokens, reduces them, and runs the block's MLP on the remaining tokens."""

    def attends(self, block: int) -> bool:
        return block in self.blocks

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if state.depth not in self.blocks or not self.changes(x.shape[1], self.blocks.index(state.depth), state):
            return super().forward(block, x, state)
        pair: tuple[torch.Tensor, ...] = ()

        def attend(attn: nn.Module, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Softmax attention, as the block's own; it remembers queries and keys."""
            nonlocal pair
            query, key, value = attn.prepared(normed, state.rope)
            pair = query, key
            mask = state.where().mask(query.dtype)
            return opaque.attention("token_reduction", query, key, value, mask).transpose(1, 2).flatten(2), normed

        x = x + block.attended(x, attend)
        return block.widened(self.fewer(x, *pair, self.blocks.index(state.depth), state))

    @abstractmethod
    def changes(self, tokens: int, place: int, state: TokenState) -> bool:
        """Whether a block reduces.

        Args:
            tokens: The number of tokens, with those in front.
            place: The block's place in `blocks`.
        """

    @abstractmethod
    def fewer(
        self, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, place: int, state: TokenState
    ) -> torch.Tensor:
        """The remaining tokens of x (B, T, C), after the attention residual; the reduction is recorded in the state.

        Args:
            query, key: (B, H, T, D), as the block's attention takes them.
        """

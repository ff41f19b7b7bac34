"""Uniform pooling: the cells of 2x2 patches become their mean, whatever they show. Other methods must beat it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._tokens import Reducer, TokenState
from terrazzo.backbones.reducers._counts import for_blocks
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import merge, plan_of


def cells(grid: tuple[int, int], part: float) -> int:
    """How many of the grid's 2x2 cells are pooled; a last odd row or column has no cells."""
    return round(part * (grid[0] // 2) * (grid[1] // 2))


def pooled(grid: tuple[int, int], part: float, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each patch (H W,) if a part of the cells is pooled, and each token's first patch.

    Pooled cells are spread evenly, and a larger part has the same cells and more. Tokens are in the order of
    their first patches.
    """
    position = torch.arange(grid[0] * grid[1], device=device)
    row, column = position // grid[1], position % grid[1]
    inside = (row < grid[0] // 2 * 2) & (column < grid[1] // 2 * 2)
    cell = row // 2 * (grid[1] // 2) + column // 2
    count = (grid[0] // 2) * (grid[1] // 2)
    # By multiples of the golden ratio: every first part of this order is spread evenly.
    order = (torch.arange(max(1, count), device=device) * 2654435769 % 2**32).argsort().argsort()
    chosen = inside & (order[torch.where(inside, cell, 0)] < cells(grid, part))
    owner = torch.where(chosen, row // 2 * 2 * grid[1] + column // 2 * 2, position)
    stands = owner == position
    first = torch.where(stands, position, len(position)).argsort()[: len(position) - 3 * cells(grid, part)]
    return (stands.float().cumsum(0).long() - 1)[owner], first


class Pooling(Reducer):
    """Replaces 2x2 cells of patches by their means, in front of one block, or parts of the cells in front of several.

    Merged tokens count as their patches in attention.
    """

    def __init__(self, blocks: Sequence[int], part: float | Sequence[float] = 1.0):
        """Args:
        blocks: Blocks in front of which cells are pooled, counted from 0.
        part: The part of all cells that is pooled when each of `blocks` begins, which must not fall. One number for
            the first block, so that later blocks have nothing to do.

        Raises:
            InputError: A number is out of range or does not fit `blocks`.
        """
        super().__init__()
        self.blocks = wholes("blocks", blocks)
        self.part = for_blocks("part", part, self.blocks, lambda part: 0 <= part <= 1, "0 to 1")
        if list(self.part) != sorted(self.part) or list(self.blocks) != sorted(self.blocks):
            raise InputError(f"blocks and part must not fall, got {self.blocks} and {self.part}")

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return (depth // 2,)

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        """All cells are pooled in front of two blocks that follow each other; with a strength of 1, of the first."""
        block, late = divmod((1 - strength) * depth, 1)
        blocks, parts = (int(block), int(block) + 1), (1 - late, 1.0)
        inside = sum(found < depth for found in blocks)
        return dict(blocks=blocks[:inside], part=parts[:inside])

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if state.depth in self.blocks:
            x = self._pooled(x, self.blocks.index(state.depth), state)
        return super().forward(block, x, state)

    def _pooled(self, x: torch.Tensor, place: int, state: TokenState) -> torch.Tensor:
        part, before = self.part[place], self.part[place - 1] if place else 0.0
        if cells(state.grid, part) == cells(state.grid, before):
            return x
        now, _ = pooled(state.grid, part, x.device)
        _, first = pooled(state.grid, before, x.device)
        # Pooled cells stay pooled, so each token's first patch says where the token goes.
        found = torch.cat([torch.arange(state.prefix, device=x.device), now[first] + state.prefix])
        count = state.prefix + state.grid[0] * state.grid[1] - 3 * cells(state.grid, part)
        merged, size, assignment = merge(x, plan_of(found.expand(len(x), -1), count), size=state.size)
        state.reduced(x, merged, assignment, size)
        return merged

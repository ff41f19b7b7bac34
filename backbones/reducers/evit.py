"""EViT: keeps the patches with the highest class attention, and fuses all others into one token.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022,
arXiv 2202.07800. Official code: github.com/youweiliang/evit, Apache-2.0.

Without the fused token this is Top-K, the baseline of every comparison.
"""

from collections.abc import Sequence
from typing import Any

import torch

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._place import Place
from terrazzo.backbones._tokens import TokenState
from terrazzo.backbones.reducers._between import Between
from terrazzo.backbones.reducers._counts import for_blocks, powers
from terrazzo.backbones.reducers._dropping import drop, kept_of, sizes
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import prune, row_mean


class _Unweighted(TokenState):
    """The state beside tokens that count as one patch each in attention, whatever they stand for."""

    def where(self) -> Place:
        return super().where()._replace(size=None)


class EViT(Between):
    """Keeps patches by class attention, between attention and MLP, at a few blocks.

    The fused token is the sum of the other patches, weighted by their class attention (not their mean: it is small if
    they got little attention). Later blocks treat it as a patch. The official code has 196 patches; here the number of
    the image's patches is meant. With a distillation token, its attention counts as much as the class token's.

    Source: arXiv 2202.07800, section 3.
    """

    by_class_token = True

    def __init__(self, blocks: Sequence[int], keep: float | Sequence[float] = 0.7, fuse: bool = True):
        """Args:
        blocks: Blocks that drop patches, counted from 0.
        keep: The part of the image's patches that each block keeps, more than 0 and at most 1: one for each block, or
            one number rho for rho, rho^2, rho^3, ...
        fuse: Whether the others become a token. If not, they are dropped, and by default the last block sees all
            positions of maps (`full_last`).

        Raises:
            InputError: A number is out of range or does not fit `blocks`.
        """
        super().__init__()
        if not isinstance(fuse, bool):
            raise InputError(f"fuse must be True or False, got {fuse!r}")
        self.blocks, self.fuse = wholes("blocks", blocks), fuse
        self.keep = for_blocks("keep", keep, self.blocks, lambda part: 0 < part <= 1, "more than 0, at most 1", powers)
        self.full_last = 0 if fuse else 1

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return tuple(sorted({depth * k // 4 for k in (1, 2, 3)}))

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(keep=1 - 0.99 * strength)

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool) -> TokenState:
        return _Unweighted(grid=grid, prefix=prefix, depth=depth, maps=maps, reducer=self)

    def count(self, place: int, state: TokenState) -> int:
        """The number of kept patches."""
        return max(1, int(state.grid[0] * state.grid[1] * self.keep[place]))

    def changes(self, tokens: int, place: int, state: TokenState) -> bool:
        return self.count(place, state) < tokens - state.prefix

    def fewer(
        self, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, place: int, state: TokenState
    ) -> torch.Tensor:
        score, kept = row_mean(query, key, rows=state.class_tokens), self.count(place, state)
        if not self.fuse:
            return drop(x, score, kept, state)[0]
        left, places, _ = prune(x, score, k=kept, protect=state.prefix)
        others = places < 0
        fused = (torch.where(others, score, 0).unsqueeze(1) @ x.to(score.dtype)).to(x.dtype)
        together = torch.where(others, sizes(state, score), 0).sum(1, keepdim=True)
        size = torch.cat([kept_of(sizes(state, score), others, left.shape[1]), together], 1)
        assignment = torch.where(others, left.shape[1], places)
        left = torch.cat([left, fused], 1)
        state.reduced(x, left, assignment, size)
        return left

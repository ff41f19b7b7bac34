"""ToMe: merges the most similar pairs of even and odd tokens, by the keys of a block's attention.

Paper: Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461. Official code: github.com/facebookresearch/ToMe,
CC-BY-NC 4.0, so nothing of it is used here; this is written from the paper.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._tokens import TokenState
from terrazzo.backbones.reducers._between import Between
from terrazzo.backbones.reducers._counts import for_blocks, schedule
from terrazzo.kernels.token_reduction import merge, plan


class ToMe(Between):
    """Merges the r best pairs of each block, between attention and MLP, by the cosine of keys (mean over heads).

    Merged tokens are means, weighted by the patches that they stand for, and count as these patches in attention.

    Source: arXiv 2210.09461, section 3.
    """

    def __init__(self, blocks: Sequence[int], r: float | Sequence[float] | str = 13):
        """Args:
        blocks: Blocks that merge, counted from 0.
        r: Number of patches that each block merges, at most half of them; below 1, the part of the patches. One number,
            or one for each block; "diffrate" for the parts that the schedule of DiffRate's authors for DeiT-S merges or
            drops in each block.

        Raises:
            InputError: r is less than 0, or not a whole number, or does not fit `blocks`.
        """
        super().__init__()
        self.blocks = wholes("blocks", blocks)
        if r == "diffrate":
            left = [1.0, *(merged for _, merged in schedule(len(self.blocks)))]
            r = [min(0.5, 1 - after / before) for before, after in itertools.pairwise(left)]
        what = "a part below 1, or a whole number of tokens"
        self.r = for_blocks("r", r, self.blocks, lambda r: 0 <= r < 1 or (r >= 1 and int(r) == r), what)

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return range(depth)

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(r=strength / 2)

    def count(self, tokens: int, place: int, state: TokenState) -> int:
        """The number of merged patches."""
        patches, r = tokens - state.prefix, self.r[place]
        return min(int(patches * r) if r < 1 else int(r), patches // 2)

    def changes(self, tokens: int, place: int, state: TokenState) -> bool:
        return self.count(tokens, place, state) > 0

    def fewer(
        self, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, place: int, state: TokenState
    ) -> torch.Tensor:
        r = self.count(x.shape[1], place, state)
        found = plan(key.mean(1), r=r, size=state.size, protect=state.prefix, criteria=(1, 0, 0))
        merged, size, assignment = merge(x, found, size=state.size)
        state.reduced(x, merged, assignment, size)
        return merged

"""PiToMe: merges tokens that have many similar tokens (high energy), and protects the others.

Paper: Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024, arXiv 2405.16148.
Official code: github.com/hchautran/PiToMe.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._tokens import TokenState
from terrazzo.backbones.reducers._between import Between
from terrazzo.backbones.reducers._counts import for_blocks
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import merge, ordered, pair, similarity


def energy(metric: torch.Tensor, margin: float, size: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens are similar to each token: the mean of elu(cosine - margin) over all tokens, itself included.

    Args:
        metric: (B, N, D).
        size: (B, N), 0 for padding, which has the energy -inf and counts for no token; None for no padding.

    Returns:
        (B, N), in float32 at least.

    Source: arXiv 2405.16148, section 3.2.
    """
    near = F.elu(similarity(metric, metric) - margin)
    if size is None:
        return near.mean(-1)
    real = (size > 0).to(near.dtype)
    return ((near @ real.unsqueeze(-1)).squeeze(-1) / real.sum(1, keepdim=True)).masked_fill(real == 0, -torch.inf)


class PiToMe(Between):
    """Merges r patches of each block, between attention and MLP, by cosine and energy of keys (mean over heads).

    By descending energy, the first 2 r patches alternate between sources and destinations; every source merges into its
    most similar destination. Merged tokens are means, weighted by the patches that they stand for, and count as these
    patches in attention.

    Source: arXiv 2405.16148, section 3.2.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        ratio: float | Sequence[float] = 0.925,
        margin: float | Sequence[float] = 0.5,
        bipartite: Sequence[int] = (),
    ):
        """Args:
        blocks: Blocks that merge, counted from 0.
        ratio: The part of the patches that each block keeps, 0.5 to 1. One number, or one for each block. The paper has
            0.9 to 0.95.
        margin: Tokens with a smaller cosine lower the energy. One number, or one for each block; the paper lets it fall
            from 0.9 to 0 with the depth.
        bipartite: The blocks, among `blocks`, in which all patches alternate, by energy, between sources and
            destinations, and the r most similar pairs merge.

        Raises:
            InputError: A number is out of range or does not fit `blocks`.
        """
        super().__init__()
        self.blocks, self.bipartite = wholes("blocks", blocks), wholes("bipartite", bipartite)
        self.ratio = for_blocks("ratio", ratio, self.blocks, lambda part: 0.5 <= part <= 1, "0.5 to 1")
        self.margin = for_blocks("margin", margin, self.blocks, lambda margin: -1 <= margin <= 1, "a cosine, -1 to 1")
        if not set(self.bipartite) <= set(self.blocks):
            raise InputError(f"bipartite must be some of the blocks {self.blocks}, got {self.bipartite}")

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return range(depth)

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(ratio=1 - strength / 2)

    def count(self, tokens: int, place: int, state: TokenState) -> int:
        """The number of merged patches."""
        patches = tokens - state.prefix
        return min(int(patches - patches * self.ratio[place]), patches // 2)

    def changes(self, tokens: int, place: int, state: TokenState) -> bool:
        return self.count(tokens, place, state) > 0

    def fewer(
        self, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, place: int, state: TokenState
    ) -> torch.Tensor:
        r, metric = self.count(x.shape[1], place, state), key.mean(1)
        of_patches = None if state.size is None else state.size[:, state.prefix :]
        order = ordered(energy(metric[:, state.prefix :], self.margin[place], of_patches)) + state.prefix
        if self.blocks[place] not in self.bipartite:
            order = order[:, : 2 * r]
        found = pair(metric, order[:, ::2], order[:, 1::2], r, state.size)
        merged, size, assignment = merge(x, found, size=state.size)
        state.reduced(x, merged, assignment, size)
        return merged

"""DiffRate: each block first drops and then merges patches of low class attention, by a schedule that was searched.

Paper: DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023, arXiv 2305.17997.
Official code: github.com/OpenGVLab/DiffRate. The search is not here, only what it found for DeiT-S.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import number, numbers, wholes
from terrazzo.backbones._tokens import TokenState
from terrazzo.backbones.reducers._between import Between
from terrazzo.backbones.reducers._counts import schedule
from terrazzo.backbones.reducers._dropping import drop, sizes
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.token_reduction import merge, ordered, pair, prop_bias, row_mean, unmerge

LEAST = 0.25  # part of the tokens that is left where maps are needed; the last block of DEIT_SMALL leaves 3 tokens


class DiffRate(Between):
    """Drops, then merges, the patches of lowest class attention, between attention and MLP.

    A merged patch joins the most similar of the patches that stay (cosine of features). Tokens are plain means of their
    groups. A source of size s and similarity c adds s c to the size of its group, and nothing if c is negative; the
    size is what a token counts in attention. With a distillation token, its attention counts as much as the class
    token's.

    Source: arXiv 2305.17997, section 3; sizes as in the official code.
    """

    by_class_token = True
    full_last = 1

    def __init__(self, blocks: Sequence[int], keep: Sequence[Sequence[float]] | None = None, rate: float = 1.0):
        """Args:
        blocks: Blocks that reduce, counted from 0.
        keep: For each block, the tokens that are left after dropping and after merging, those in front included, as
            published; up to 1, the part of the image's tokens. None for the authors' schedule of DeiT-S. Where maps
            are needed, at least a quarter of the tokens stays.
        rate: Without `keep`: what the schedule removes is multiplied by this number; 0 removes nothing.

        Raises:
            InputError: `keep` does not fit `blocks` or holds a number that is not valid, or `rate` is less than 0 or
                stands beside `keep`.
        """
        super().__init__()
        self.blocks = wholes("blocks", blocks)
        rate = number("rate", rate)
        if rate < 0 or (keep is not None and rate != 1):
            raise InputError(f"rate must be at least 0, and belongs to the schedule, so not beside keep, got {rate}")
        given = schedule(len(self.blocks), rate) if keep is None else keep
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(self.blocks):
            raise InputError(f"keep must hold two numbers for each of {len(self.blocks)} blocks, got {keep}")
        self.keep = tuple(numbers("keep", both) for both in given)
        for both in self.keep:
            if len(both) != 2 or min(both) <= 0 or (max(both) > 1 and any(int(part) != part for part in both)):
                raise InputError(f"keep must hold two positive numbers for each block, got {both}")

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return range(depth)

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(rate=2 * strength)

    def counts(self, tokens: int, place: int, state: TokenState) -> tuple[int, int]:
        """The number of patches that are left after dropping and after merging."""
        whole, left = state.prefix + state.grid[0] * state.grid[1], tokens - state.prefix
        least = int(LEAST * whole) if state.maps else 0
        kept = (round(part * whole) if part <= 1 else int(part) for part in self.keep[place])
        dropped, merged = (min(left, max(1, least, part - state.prefix)) for part in kept)
        return dropped, min(dropped, merged)

    def changes(self, tokens: int, place: int, state: TokenState) -> bool:
        return min(self.counts(tokens, place, state)) < tokens - state.prefix

    def fewer(
        self, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, place: int, state: TokenState
    ) -> torch.Tensor:
        dropped, kept = self.counts(x.shape[1], place, state)
        score = row_mean(query, key, prop_bias(state.size), state.class_tokens)
        if dropped < x.shape[1] - state.prefix:
            x, score = drop(x, score, dropped, state)
        return x if kept == dropped else self._merged(x, score, kept, state)

    @staticmethod
    def _merged(x: torch.Tensor, score: torch.Tensor, kept: int, state: TokenState) -> torch.Tensor:
        """All but the `kept` best patches are merged into these."""
        destinations, sources = (ordered(score[:, state.prefix :]) + state.prefix).tensor_split([kept], 1)
        found = pair(x, sources, destinations)
        heads = torch.cat([x[:, : state.prefix], unmerge(x, destinations)], 1)  # of the groups, in their order
        dtype = accumulator(x)
        share = F.cosine_similarity(x.detach().to(dtype), unmerge(heads, found.map).detach().to(dtype), dim=-1)
        merging = torch.zeros_like(found.map).scatter(1, sources, 1) > 0
        size = sizes(state, share) * torch.where(merging, share.clamp(min=0), 1)
        merged, size, assignment = merge(x, found, torch.ones_like(share), size)
        state.reduced(x, merged, assignment, size)
        return merged

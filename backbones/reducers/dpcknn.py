"""DPC-KNN: clusters patches around density peaks, as the token merging of TCFormer.

Papers: Study on Density Peaks Clustering Based on k-Nearest Neighbors, Knowledge-Based Systems 2016; Not All Tokens Are
Equal: Human-centric Visual Analysis via Token Clustering Transformer (TCFormer), CVPR 2022, arXiv 2204.08680. Official
code: github.com/zengwang430521/TCFormer, Apache-2.0. TCFormer's learned importance of tokens is left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from terrazzo.backbones._checks import whole, wholes
from terrazzo.backbones._tokens import Reducer, TokenState
from terrazzo.backbones.reducers._counts import for_blocks, powers
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.token_reduction import merge, ordered, plan_of


def clusters(x: torch.Tensor, count: int, k: int, size: torch.Tensor | None = None) -> torch.Tensor:
    """The cluster of each token, (B, N) to 0 ... count - 1; clusters are in the order of their centres.

    A token's density is high if its k nearest tokens, itself included, are near. Centres are the tokens with the
    largest product of density and distance to the nearest denser token. The others join the nearest centre. Of equally
    dense tokens, the first counts as denser (the official code adds noise).

    Args:
        x: (B, N, C).
        size: (B, N), 0 for padding, which is in nobody's neighbourhood and becomes a centre last; None for no padding.

    Source: arXiv 2204.08680, section 3.2.
    """
    with without_autocast(x):
        x = x.detach().to(accumulator(x)) / math.sqrt(x.shape[2])
        square = x.square().sum(-1)
        apart = (square.unsqueeze(1) + square.unsqueeze(2) - 2 * x @ x.transpose(1, 2)).clamp(min=0)  # B N N, squared
        position = torch.arange(x.shape[1], device=x.device)
        apart = torch.where(position[:, None] == position, 0, apart)
        padding = None if size is None else size <= 0
        if padding is not None:
            apart = apart.masked_fill(padding.unsqueeze(1), torch.inf)
        near = apart.topk(min(k, x.shape[1]), -1, largest=False).values
        real = near.isfinite()
        density = (-torch.where(real, near, 0).sum(-1) / real.sum(-1).clamp(min=1)).exp()
        if padding is not None:
            density = density.masked_fill(padding, -1)
        mine, other = density.unsqueeze(2), density.unsqueeze(1)
        denser = (other > mine) | ((other == mine) & (position < position[:, None]))
        farthest = torch.where(apart.isfinite(), apart, 0).amax((1, 2))
        distance = torch.where(denser, apart, torch.inf).amin(-1).minimum(farthest.unsqueeze(1)).sqrt()
        score = density * distance
        if padding is not None:
            score = score.masked_fill(padding, -1)
        centres = ordered(score)[:, :count].sort(-1).values
        joined = apart.gather(2, centres.unsqueeze(1).expand(-1, x.shape[1], -1)).argmin(-1)
        return joined.scatter(1, centres, torch.arange(count, device=x.device).expand(len(x), -1))


class DPCKNN(Reducer):
    """Clusters the patches in front of a few blocks; each cluster becomes the mean of its tokens.

    Means are weighted by the patches that tokens stand for, and count as these patches in attention. With `window`,
    `terrazzo.reduce` clusters within windows, as TCFormer does within parts of large maps.

    Source: arXiv 2204.08680, section 3.2.
    """

    def __init__(self, blocks: Sequence[int], keep: float | Sequence[float] = 0.7, neighbours: int = 5):
        """Args:
        blocks: Blocks in front of which patches are clustered, counted from 0.
        keep: The number of clusters, as a part of the image's patches, more than 0 and at most 1: one for each block,
            or one number rho for rho, rho^2, rho^3, ...
        neighbours: The number of nearest tokens, the token itself included, whose distances make its density.

        Raises:
            InputError: A number is out of range or does not fit `blocks`.
        """
        super().__init__()
        self.blocks, self.neighbours = wholes("blocks", blocks), whole("neighbours", neighbours)
        self.keep = for_blocks("keep", keep, self.blocks, lambda part: 0 < part <= 1, "more than 0, at most 1", powers)
        if self.neighbours < 2:
            raise InputError(f"neighbours must be 2 or more, the token itself included, got {neighbours}")

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        return tuple(sorted({depth * k // 4 for k in (1, 2, 3)}))

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        return dict(keep=1 - 0.99 * strength)

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if state.depth in self.blocks:
            x = self._clustered(x, self.blocks.index(state.depth), state)
        return super().forward(block, x, state)

    def _clustered(self, x: torch.Tensor, place: int, state: TokenState) -> torch.Tensor:
        count = max(1, int(state.grid[0] * state.grid[1] * self.keep[place]))
        if count >= x.shape[1] - state.prefix:
            return x
        size = None if state.size is None else state.size[:, state.prefix :]
        found = clusters(x[:, state.prefix :], count, self.neighbours, size) + state.prefix
        front = torch.arange(state.prefix, device=x.device).expand(len(x), -1)
        merged, size, assignment = merge(
            x, plan_of(torch.cat([front, found], 1), state.prefix + count), size=state.size
        )
        state.reduced(x, merged, assignment, size)
        return merged

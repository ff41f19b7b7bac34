"""The differentiable counts of DiffRate: how many patches each block keeps, learned while a ViT's weights are fixed.

Paper: DiffRate, ICCV 2023, arXiv 2305.17997, section 3. Official code: github.com/OpenGVLab/DiffRate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._tokens import Reducer, State
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.token_reduction import ordered


class Counts(nn.Module):
    """A learned number of 1 to `patches` patches: the mean of all numbers under learned probabilities, rounded up.

    The gradient passes through rounding, and through the step from kept to removed ranks, to the probabilities
    (straight-through estimators).
    """

    def __init__(self, patches: int, device: torch.device | None = None):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(patches, device=device))  # of 1, 2, ..., patches

    def forward(self) -> torch.Tensor:
        """The number, a scalar."""
        numbers = torch.arange(1, len(self.logits) + 1, device=self.logits.device, dtype=self.logits.dtype)
        mean = (self.logits.softmax(0) * numbers).sum()
        return mean + (mean.ceil() - mean).detach()

    def kept(self, rank: torch.Tensor, before: int) -> torch.Tensor:
        """1 for patches that stay, and 0 for patches that this block removes, in the shape of `rank`.

        The gradient of a patch is that of the probability that the number is larger than its rank.

        Args:
            rank: Ranks of patches, from 0 for the best.
            before: How many patches there were; higher ranks, which are gone already, give 1.
        """
        probability = self.logits.softmax(0).flip(0).cumsum(0).flip(0)[rank]
        gone = (rank >= int(self())) & (rank < before)
        return (~gone).to(probability.dtype) + probability - probability.detach()


class RatesState(State):
    """The state beside tokens (B, N, C), of which none is taken away: removed tokens are masked.

    Attributes:
        size: (B, N), what each token counts in attention.
        mask: (B, N), 1 for tokens that are left, 0 for the others, with gradients to the counts.
        left: How many patches are left.
    """

    size: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    left: int = 0


class Kept(NamedTuple):
    """Patches that are left in a block, whole numbers."""

    after_dropping: int
    after_merging: int


class Rates(Reducer):
    """DiffRate with learned counts: each block computes all tokens, and gives no weight to removed tokens.

    With the counts that it found, it computes for the remaining tokens what the method "diffrate" computes.

    Args:
        blocks: Blocks that reduce.
        patches: Patches of an image.
    """

    by_class_token = True

    def __init__(self, blocks: tuple[int, ...], patches: int, device: torch.device | None = None):
        super().__init__()
        self.blocks, self.patches = blocks, patches
        self.drops = nn.ModuleList(Counts(patches, device) for _ in blocks)
        self.merges = nn.ModuleList(Counts(patches, device) for _ in blocks)

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool) -> RatesState:
        return RatesState(grid=grid, prefix=prefix, depth=depth, maps=maps, reducer=self, left=grid[0] * grid[1])

    def attends(self, block: int) -> bool:
        return block >= min(self.blocks)

    def forward(self, block: nn.Module, x: torch.Tensor, state: RatesState) -> torch.Tensor:
        if not self.attends(state.depth):
            return super().forward(block, x, state)
        if state.size is None:
            state.size, state.mask = (torch.ones(x.shape[:2], device=x.device, dtype=accumulator(x)) for _ in range(2))
        weights: torch.Tensor = x.new_empty(0)

        def attend(attn: nn.Module, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal weights
            query, key, value = attn.prepared(normed, state.rope)
            weights = masked_attention(query, key, state.size, state.mask)
            return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2), normed

        x = x + block.attended(x, attend)
        if state.depth in self.blocks:
            place = self.blocks.index(state.depth)
            score = weights[:, :, : state.class_tokens].mean((1, 2)).detach()
            x = self._reduced(x, score, self.drops[place], self.merges[place], state)
        return block.widened(x)

    def _reduced(
        self, x: torch.Tensor, score: torch.Tensor, drops: Counts, merges: Counts, state: RatesState
    ) -> torch.Tensor:
        prefix, whole = state.prefix, x.shape[1]
        patches = torch.where(state.mask > 0.5, score, -1)[:, prefix:]
        rank = torch.empty_like(patches, dtype=torch.long)
        rank.scatter_(1, ordered(patches), torch.arange(whole - prefix, device=x.device).expand_as(rank))
        for counts in (drops, merges):
            number = int(counts())
            if number >= state.left:
                continue
            if counts is merges:
                x = _merged(x, rank, number, state)
            kept = counts.kept(rank, state.left)
            state.mask = state.mask * torch.cat([torch.ones_like(state.mask[:, :prefix]), kept], 1)
            state.left = number
        return x

    def share(self, vit: nn.Module) -> torch.Tensor:
        """Multiply-adds of all blocks as a part of the whole model's, with gradients to the counts.

        Counted are the linear layers and both products of attention.
        """
        return self._share(vit, [torch.stack([drops(), merges()]) for drops, merges in zip(self.drops, self.merges)])

    def least_share(self, vit: nn.Module) -> float:
        """The same if each block leaves one patch."""
        return self._share(vit, [torch.ones(2)] * len(self.blocks)).item()

    def _share(self, vit: nn.Module, left: Sequence[torch.Tensor]) -> torch.Tensor:
        """The part for the numbers of patches after dropping and after merging, (2,), of each reducing block."""
        whole = left[0].new_tensor(float(self.patches + vit.num_prefix_tokens))
        tokens, found, most = whole, torch.zeros_like(whole), torch.zeros_like(whole)
        for depth, block in enumerate(vit.blocks):
            attention, mlp = (_products(part) for part in (block.attn, block.mlp))
            found = found + attention * tokens + 2 * vit.embed_dim * tokens**2
            if depth in self.blocks:
                both = left[self.blocks.index(depth)] + vit.num_prefix_tokens
                # Both counts get the gradient of the smaller number, so that the larger number can become the smaller.
                tokens = both.sum() - both.sum().detach() + torch.minimum(tokens, both.min()).detach()
            found = found + mlp * tokens
            most = most + attention * whole + 2 * vit.embed_dim * whole**2 + mlp * whole
        return found / most

    def kept(self) -> tuple[Kept, ...]:
        """The numbers that were found, for each block; no number is larger than the one before."""
        found, left = [], self.patches
        for drops, merges in zip(self.drops, self.merges):
            dropped = min(left, int(drops()))
            left = min(dropped, int(merges()))
            found.append(Kept(dropped, left))
        return tuple(found)


def _products(module: nn.Module) -> int:
    """Multiply-adds of the linear layers for a token."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


def masked_attention(query: torch.Tensor, key: torch.Tensor, size: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention in which each key counts `size` times, and masked keys count for themselves alone.

    Args:
        query, key: (B, heads, N, D).
        size: (B, N), above 0.
        mask: (B, N), 0 for masked keys; it gets gradients, from masked keys, too.

    Returns:
        Weights (B, heads, N, N), in float32 at least.
    """
    with without_autocast(query):
        logits = query.to(accumulator(query)) @ key.to(accumulator(key)).transpose(2, 3) * query.shape[3] ** -0.5
        logits = logits + size.log()[:, None, None]
        own = torch.eye(mask.shape[1], device=mask.device, dtype=mask.dtype)
        policy = mask[:, None, None] * (1 - own) + own
        weights = (logits - logits.amax(3, keepdim=True).detach()).exp() * policy
        return weights / weights.sum(3, keepdim=True)


def _merged(x: torch.Tensor, rank: torch.Tensor, kept: int, state: RatesState) -> torch.Tensor:
    """The tokens, with the means of groups in place of the best `kept` patches; the state gets the groups' sizes."""
    prefix, dtype = state.prefix, accumulator(x)
    patches, size = x[:, prefix:].to(dtype), state.size[:, prefix:]
    source, best = (rank >= kept) & (rank < state.left), rank < kept
    with without_autocast(x):
        unit = F.normalize(patches.detach(), dim=2)
        alike = (unit @ unit.transpose(1, 2)).masked_fill(~best[:, None], -2)  # B source destination
        share, onto = alike.max(2)
        group = torch.where(source, onto, torch.arange(rank.shape[1], device=x.device))
        joins = F.one_hot(group, rank.shape[1]).transpose(1, 2).to(dtype)  # B destination source
        means = joins @ patches / joins.sum(2, keepdim=True).clamp(min=1)
        sizes = joins @ torch.where(source, size * share.clamp(min=0), size)[..., None]
    state.size = torch.cat([state.size[:, :prefix], torch.where(best, sizes[..., 0], size)], 1)
    return torch.cat([x[:, :prefix], torch.where(best[..., None], means.to(x.dtype), x[:, prefix:])], 1)

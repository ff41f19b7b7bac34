"""The state beside the tokens of a reducing ViT, and the way back from the remaining tokens to every position.

A reducer merges tokens in front of some blocks. The blocks between two reductions are a level. Each completed level
is recorded with the map into the next level. These records restore a token for every position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones._rotary import pooled, unit
from terrazzo.backbones._states import Beside
from terrazzo.kernels.token_reduction import Plan, compose, unmerge

NEIGHBOURS, TEMPERATURE = 20, 0.01  # of the mode "soft", as in Expedite's SAM (arXiv 2210.01035)


class Level(NamedTuple):
    """Tokens between two reductions.

    Attributes:
        entered, left: (B, N, C), the tokens at the beginning and at the end of the level.
        map: (B, N), to the tokens of the next level.
        merged: (B, M, C), the tokens at the beginning of the next level.
        size: (B, M), patches that each merged token stands for; 0 for padding.
        dropped: (B, N), which tokens were dropped; `map` has the remaining token whose updates they get in maps. None
            for none.
    """

    entered: torch.Tensor
    left: torch.Tensor
    map: torch.Tensor
    merged: torch.Tensor
    size: torch.Tensor
    dropped: torch.Tensor | None = None


class State(Beside):
    """The state beside the tokens of a plain ViT, for any reducer.

    Attributes:
        grid: Rows and columns of the patches.
        prefix: Tokens in front that are not patches; nothing merges or parks them.
        class_tokens: How many of the first tokens a classifier reads, one each: a class token, a distillation token.
        depth: Number of blocks that have run.
        maps: Whether maps will be needed; otherwise nothing is recorded.
        reducer: Runs the blocks.
        ropes: For each block, rotary positions of the patches before any reduction (`_rotary`); None for none.
        turned: Positions from `ropes`, and the positions of the remaining patches; None if the tokens changed since.
    """

    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    class_tokens: int = 1
    depth: int = 0
    maps: bool = True
    reducer: Any = None
    ropes: dict[int, torch.Tensor] | None = None
    turned: tuple[torch.Tensor, torch.Tensor] | None = None

    def where(self) -> Place:
        """Where the tokens of the next block stand."""
        return Place(self.grid, self.prefix)

    @property
    def rope(self) -> torch.Tensor | None:
        """Rotary positions of the remaining patches for the next block."""
        if self.ropes is None:
            return None
        rope = self.ropes[self.depth]
        if self.turned is None or self.turned[0] is not rope:
            self.turned = rope, self.followed(rope)
        return self.turned[1]

    def followed(self, rope: torch.Tensor) -> torch.Tensor:
        """The rotary positions of the remaining patches, from the positions before any reduction."""
        return rope

    def moved(self) -> None:
        """The tokens are other tokens now, or have another order."""
        self.turned = None


class TokenState(State):
    """The state beside tokens (B, T, C) that are merged.

    Attributes:
        entered: Tokens at the beginning of the current level.
        size: (B, T), patches that each token stands for, 0 for padding; None for 1 each.
        levels: The completed levels.
        window: Rows and columns of a window, if patches are ordered by windows; None for the grid's order.
        standing: With `ropes`: the token that stands for each of the tokens for which `ropes` were made; None for the
            same tokens.
        weight: (B, N), patches that each of these tokens stands for, 0 for padding and dropped tokens; None for 1 each.
        r: Number of tokens that each reduction removes, as given at the beginning of the forward pass.
    """

    entered: torch.Tensor | None = None
    size: torch.Tensor | None = None
    levels: tuple[Level, ...] = ()
    window: tuple[int, int] | None = None
    standing: Plan | None = None
    weight: torch.Tensor | None = None
    r: float | None = None

    def where(self) -> Place:
        whole = self.size is None and self.window is None
        return Place(self.grid if whole else None, self.prefix, self.size)

    def follow(self, assignment: torch.Tensor, count: int, dropped: torch.Tensor | None = None) -> None:
        """Move rotary positions with the tokens.

        Args:
            assignment: (B, T), which of `count` tokens each token became.
            dropped: (B, T), which tokens became no token; None for none.
        """
        if self.ropes is not None:
            before = self.standing
            if dropped is not None:
                gone = dropped if before is None else dropped.gather(1, before.map)
                weight = torch.ones_like(gone, dtype=torch.float32) if self.weight is None else self.weight
                self.weight = weight.masked_fill(gone, 0)
            self.standing = Plan(assignment if before is None else compose(assignment, before.map), count)
            self.moved()

    def means(self, rope: torch.Tensor) -> torch.Tensor:
        """The mean (sin, cos) of the patches for which each token stands."""
        return rope if self.standing is None else pooled(rope, self.standing, self.weight, self.prefix)

    def followed(self, rope: torch.Tensor) -> torch.Tensor:
        means = self.means(rope)
        return means if means.dim() < 4 else unit(means)  # the grid's own positions have no axis of images

    def reduced(
        self,
        left: torch.Tensor,
        merged: torch.Tensor,
        assignment: torch.Tensor,
        size: torch.Tensor,
        dropped: torch.Tensor | None = None,
    ) -> None:
        """Record a reduction from the tokens `left` to `merged`; the other arguments are as in `Level`."""
        self.size = size
        self.follow(assignment, merged.shape[1], dropped)
        if self.maps:
            entered = left if self.entered is None else self.entered
            self.levels = (*self.levels, Level(entered, left, assignment, merged, size, dropped))
            self.entered = merged


def _copied(x: torch.Tensor, state: TokenState) -> torch.Tensor:
    for level in reversed(state.levels):
        x = unmerge(x, level.map)
        if level.dropped is not None:
            x = torch.where(level.dropped.unsqueeze(-1), level.left, x)
    return x


def _updated(x: torch.Tensor, state: TokenState) -> torch.Tensor:
    first, *others = state.levels
    out, assignment = first.left, first.map
    for level in others:
        out = out + unmerge(level.left - level.entered, assignment)
        assignment = compose(level.map, assignment)
    return out + unmerge(x - state.entered, assignment)


def _blended(x: torch.Tensor, state: TokenState) -> torch.Tensor:
    for level in reversed(state.levels):
        old, new = (t[:, state.prefix :] for t in (level.left, level.merged))
        nearness = -TEMPERATURE * torch.cdist(old.float(), new.float()).square()
        nearness = nearness.masked_fill(level.size[:, None, state.prefix :] == 0, float("-inf"))
        nearest, index = nearness.topk(min(NEIGHBOURS, new.shape[1]), -1)
        weight = nearest.softmax(-1).to(x.dtype)  # B N K
        body = x[:, state.prefix :]
        taken = unmerge(body, index.flatten(1)).unflatten(1, index.shape[1:])  # B N K C
        x = torch.cat([x[:, : state.prefix], (weight.unsqueeze(-1) * taken).sum(2)], 1)
    return x


RESTORE: dict[str, Callable[[torch.Tensor, TokenState], torch.Tensor]] = {
    "copy": _copied,
    "delta": _updated,
    "soft": _blended,
}
"""Modes that restore a token for every position.

copy: a position gets the token that stands for it; a dropped token keeps its features. delta: a position keeps its
features from before its first merge, and gets the later updates of the tokens that stood for it; a dropped token gets
those of a similar token. soft: a position gets a mean of the tokens that were nearest to it when they were merged
(Expedite, arXiv 2210.01035).
"""


class Reducer(nn.Module):
    """Runs a ViT's blocks. This base reduces nothing; it weights keys by the patches that they stand for.

    A reducer makes the state of its blocks, a `State` or a subclass.

    Attributes:
        blocks: The blocks in front of which it reduces, counted from 0.
        by_class_token: Whether it depends on the attention of a class token, the first token in front.
        full_last: How many last blocks `terrazzo.reduce` runs on restored tokens by default when maps are requested.
    """

    blocks: tuple[int, ...] = ()
    by_class_token = False
    full_last = 0

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        """The blocks in front of which to reduce by default."""
        return ()

    @staticmethod
    def of_strength(strength: float, depth: int) -> dict[str, Any]:
        """Options of `terrazzo.reduce` for a strength of 0 (nothing is reduced) to 1, and a ViT of `depth` blocks.

        Multiply-adds fall with it, so benchmarks find options for given multiply-adds.
        """
        return {}

    def attends(self, block: int) -> bool:
        """Whether the reducer computes a block's attention itself, so that the block can have no mixer."""
        return False

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool) -> TokenState:
        """The state in front of a block that gets all tokens."""
        return TokenState(grid=grid, prefix=prefix, depth=depth, maps=maps, reducer=self)

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Run a timm block on tokens (B, T, C). A block calls this method, which calls the block's parts."""
        return block.placed(x, state.where(), state.rope)

    def left(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """The remaining tokens, (B, T, C)."""
        return x

    def assignment(self, state: TokenState) -> torch.Tensor | None:
        """For each position the token that stands for it, or -1: (B, prefix + H W). None before any reduction."""
        if not state.levels:
            return None
        first, *others = (
            level.map if level.dropped is None else level.map.masked_fill(level.dropped, -1) for level in state.levels
        )
        for level in others:
            first = compose(level, first)
        return first

    def finished(self, x: torch.Tensor, state: TokenState, mode: str) -> torch.Tensor:
        """A token for every position, and a state in which no later block reduces (last-layer fusion)."""
        x, ropes = self.restored(x, state, mode), state.ropes
        state.become(self.begin(state.grid, state.prefix, state.depth, maps=True))
        state.reducer, state.ropes = Reducer(), ropes
        return x

    def restored(self, x: torch.Tensor, state: TokenState, mode: str) -> torch.Tensor:
        """A token for every position, (B, prefix + H W, C); `x` itself if nothing was reduced."""
        return RESTORE[mode](x, state) if state.levels else x

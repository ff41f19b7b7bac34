"""What flows beside the tokens of a reducing ViT, and the way back from what is left of them to every position.

A reducer merges tokens in front of some blocks. Between two reductions lies a level. Each level that was left
is recorded, with the map into the next: from these a token is made for every position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import nn

from terrazzo.backbones._states import Beside
from terrazzo.kernels.token_reduction import compose, prop_bias, unmerge

NEIGHBOURS, TEMPERATURE = 20, 0.01  # of the mode "soft": those of Expedite's SAM (arXiv 2210.01035)


class Level(NamedTuple):
    """Tokens between two reductions.

    Attributes:
        entered, left: (B, N, C), when the level began and when it ended.
        map: (B, N), to the tokens of the next level.
        merged: (B, M, C), with which the next level begins.
        size: (B, M), patches that each of those stands for; 0 for padding.
    """

    entered: torch.Tensor
    left: torch.Tensor
    map: torch.Tensor
    merged: torch.Tensor
    size: torch.Tensor


class State(Beside):
    """What flows beside the tokens of a plain ViT, whatever reduces them.

    Attributes:
        grid: Rows and columns of the patches.
        prefix: Tokens in front that are no patches; nothing merges or parks them.
        depth: Blocks that were run.
        maps: Whether anybody will ask for maps; without that nothing is recorded.
        reducer: What runs the blocks.
    """

    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    depth: int = 0
    maps: bool = True
    reducer: Any = None


class TokenState(State):
    """What flows beside the tokens (B, T, C) where they are merged.

    Attributes:
        entered: Tokens at the beginning of the current level.
        size: (B, T), patches that each token stands for, 0 for padding; None for 1 each.
        levels: Those that were left.
        window: Rows and columns of the windows in whose order the patches are; None for the grid's order.
        r: How many tokens each reduction takes away, where whoever began the forward says so.
    """

    entered: torch.Tensor | None = None
    size: torch.Tensor | None = None
    levels: tuple[Level, ...] = ()
    window: tuple[int, int] | None = None
    r: float | None = None

    def reduced(self, left: torch.Tensor, merged: torch.Tensor, assignment: torch.Tensor, size: torch.Tensor) -> None:
        """Note a reduction from the tokens `left` to `merged`."""
        self.size = size
        if self.maps:
            entered = left if self.entered is None else self.entered
            self.levels = (*self.levels, Level(entered, left, assignment, merged, size))
            self.entered = merged


def _copied(x: torch.Tensor, state: TokenState) -> torch.Tensor:
    for level in reversed(state.levels):
        x = unmerge(x, level.map)
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
"""From tokens to one for every position.

copy: each gets the token that stands for it. delta: each keeps what it was when it was first merged, and gets the
updates since of the tokens that stood for it. soft: each gets a mean of the tokens that were nearest to it when they
were merged (Expedite, arXiv 2210.01035).
"""


class Reducer(nn.Module):
    """Runs a ViT's blocks: this one as they are, with keys weighted by the patches they stand for.

    A reducer makes the state that its blocks carry, a `State` and what is theirs.

    Attributes:
        blocks: In front of which it reduces, counted from 0.
        by_class_token: Whether it goes by the attention of a class token, the first of those in front.
    """

    blocks: tuple[int, ...] = ()
    by_class_token = False

    @staticmethod
    def default_blocks(depth: int) -> Sequence[int]:
        """In front of which blocks to reduce where nobody says."""
        return ()

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool) -> TokenState:
        """The state in front of a block that gets every token."""
        return TokenState(grid=grid, prefix=prefix, depth=depth, maps=maps, reducer=self)

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """What a block of timm's makes of tokens (B, T, C). A block calls this; it calls the block's parts."""
        bias = prop_bias(state.size)
        return Block.forward(block, x, attn_mask=None if bias is None else bias[:, None, None].to(x.dtype))

    def left(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """What is left, (B, T, C)."""
        return x

    def assignment(self, state: TokenState) -> torch.Tensor | None:
        """For each position the token that stands for it, -1 for none: (B, prefix + H W); None before any reduction."""
        if not state.levels:
            return None
        first, *others = state.levels
        found = first.map
        for level in others:
            found = compose(level.map, found)
        return found

    def restored(self, x: torch.Tensor, state: TokenState, mode: str) -> torch.Tensor:
        """A token for every position, (B, prefix + H W, C); `x` itself where nothing was reduced."""
        return RESTORE[mode](x, state) if state.levels else x

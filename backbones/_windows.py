"""Attention within windows of the grid, as in ViTDet for large images, around any reducer that merges tokens.

Windows have equal sizes, not larger than the limit: with a limit of 14, a side of 64 patches has 5 windows of 13. So
padding, at the bottom and on the right, is less than one row or column per window. A grid that fits into one window is
attended to as a whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import whole, wholes
from terrazzo.backbones._layers import join_windows, split_windows, window_counts
from terrazzo.backbones._tokens import Reducer, TokenState
from terrazzo.errors import InputError


def spread(depth: int) -> tuple[int, ...]:
    """The last block of each quarter, like ViTDet's global blocks: (2, 5, 8, 11) of 12."""
    return tuple(sorted({max(0, depth * k // 4 - 1) for k in range(1, 5)}))


def even(side: int, window: int) -> int:
    """The length of equal windows along a side, at most `window`; the last window may need padding."""
    return -(-side // -(-side // window))


def to_windows(x: torch.Tensor, grid: tuple[int, int], window: tuple[int, int]) -> torch.Tensor:
    """Reorder patches (B, H W, C) window by window, (B, windows rows columns, C), padded with zeros."""
    return split_windows(x.unflatten(1, grid), window).flatten(1, 4)


def from_windows(x: torch.Tensor, grid: tuple[int, int], window: tuple[int, int]) -> torch.Tensor:
    """The inverse of `to_windows`, without the padding."""
    return join_windows(x.unflatten(1, (*window_counts(grid, window), *window)), grid).flatten(1, 2)


class Windows(Reducer):
    """Runs a reducer on each window as on an image, and some global blocks on all remaining tokens of the image.

    Each window has a copy of the tokens in front. After each block the copies are averaged over the windows, weighted
    by their patches. All windows lose the same number of tokens in a block. Padding has size 0, so no token sees it,
    but its queries count in MCTF's informativeness. Stochastic depth drops branches of windows, not of images. With a
    single window the result equals the reducer's alone, to the bit.

    Source: ViTDet, arXiv 2203.16527, section 3. ViTDet has no tokens in front, and pads to windows of one size.
    """

    def __init__(self, reducer: Reducer, window: int, depth: int, global_blocks: Sequence[int] | None = None):
        """Args:
        window: The largest number of patches in a row or column of a window.
        depth: Blocks of the ViT.
        global_blocks: Blocks that attend to all tokens, counted from 0; None for the last block of each quarter.

        Raises:
            InputError: A number is out of range; a block both merges and attends to all tokens (afterwards windows
                could not be separated); or the reducer depends on the class token's attention over the whole image.
        """
        super().__init__()
        window = whole("window", window)
        global_blocks = spread(depth) if global_blocks is None else wholes("global_blocks", global_blocks)
        if window < 1:
            raise InputError(f"window must be at least 1, got {window}")
        if not all(0 <= block < depth for block in global_blocks):
            raise InputError(f"global_blocks must be some of 0 to {depth - 1}, got {global_blocks}")
        if reducer.by_class_token:
            raise InputError("tokens are dropped by class attention over the whole image, so there can be no windows")
        both = sorted(set(global_blocks) & set(reducer.blocks))
        if both:
            raise InputError(f"blocks {both} attend globally, so they cannot merge: give `blocks` without them")
        self.reducer = reducer
        self.window = window
        self.global_blocks = global_blocks

    def attends(self, block: int) -> bool:
        return self.reducer.attends(block)

    def begin(self, grid: tuple[int, int], prefix: int, depth: int, maps: bool, **choices: Any) -> TokenState:
        state = self.reducer.begin(grid, prefix, depth, maps, **choices)
        state.reducer = self
        return state

    def forward(self, block: nn.Module, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if state.depth in self.global_blocks or max(state.grid) <= self.window:
            return self.reducer(block, x, state)
        if state.window is None:
            x = self._enter(x, state)
        folded, inside = self._fold(x, state)
        out = self.reducer(block, folded, inside)
        for level in inside.levels:
            assert level.dropped is None  # `__init__` refuses the methods that drop tokens
            merged, size = self._unfold(level.merged, state), self._unfold(inside.size.unsqueeze(2), state).squeeze(2)
            left = x if level.left is folded else self._unfold(level.left, state)
            state.reduced(left, merged, self._unfold_map(level.map, state, level.merged.shape[1]), size)
        return self._unfold(out, state)

    def _enter(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Order tokens by windows; padding has size 0."""
        state.window = tuple(even(side, self.window) for side in state.grid)
        front, body = x.tensor_split([state.prefix], 1)
        count = state.grid[0] * state.grid[1]
        body = to_windows(body, state.grid, state.window)
        if body.shape[1] != count:
            real = to_windows(x.new_ones(1, count, 1, dtype=torch.float32), state.grid, state.window)
            size = F.pad(real.squeeze(2), (state.prefix, 0), value=1.0)
            state.size = size.expand(x.shape[0], -1)
        if state.ropes is not None:
            place = torch.arange(body.shape[1], device=x.device).view(1, -1, 1)
            place = from_windows(place, state.grid, state.window).squeeze(2) + state.prefix
            place = torch.cat([torch.arange(state.prefix, device=x.device).unsqueeze(0), place], 1)
            state.follow(place.expand(x.shape[0], -1), state.prefix + body.shape[1])
        return torch.cat([front, body], 1)

    def _fold(self, x: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        """Reshape (B, prefix + windows T, C) to (B windows, prefix + T, C), and make a state with windows as images."""
        rows, columns = window_counts(state.grid, state.window)

        def fold(x: torch.Tensor) -> torch.Tensor:
            front, body = x.tensor_split([state.prefix], 1)
            front = front.unsqueeze(1).expand(-1, rows * columns, -1, -1)
            return torch.cat([front, body.unflatten(1, (rows * columns, -1))], 2).flatten(0, 1)

        size = None if state.size is None else fold(state.size.unsqueeze(2)).squeeze(2)
        inside = TokenState(
            grid=state.window, prefix=state.prefix, depth=state.depth, reducer=self.reducer, size=size, r=state.r
        )
        if state.ropes is not None:
            means = state.means(state.ropes[state.depth]).unflatten(2, (rows * columns, -1))
            inside.ropes, inside.weight = {state.depth: means.transpose(1, 2).flatten(0, 1)}, size
        return fold(x), inside

    @staticmethod
    def _unfold(x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Reshape (B windows, prefix + T, C) to (B, prefix + windows T, C), with means of the tokens in front."""
        rows, columns = (
            (side - torch.arange(count, device=x.device) * length).clamp(max=length)
            for side, length, count in zip(state.grid, state.window, window_counts(state.grid, state.window))
        )
        patches = (rows.unsqueeze(1) * columns).flatten()
        share = patches.to(torch.promote_types(x.dtype, torch.float32)) / (state.grid[0] * state.grid[1])
        front, body = x.unflatten(0, (-1, patches.shape[0])).tensor_split([state.prefix], 2)
        front = (front * share[:, None, None]).sum(1).to(x.dtype)
        return torch.cat([front, body.flatten(1, 2)], 1)

    @staticmethod
    def _unfold_map(assignment: torch.Tensor, state: TokenState, left: int) -> torch.Tensor:
        """Turn maps within windows (B windows, prefix + T), to `left` tokens each, into a map of the image."""
        rows, columns = window_counts(state.grid, state.window)
        windows = torch.arange(rows * columns, device=assignment.device)
        assignment = assignment.unflatten(0, (-1, rows * columns))
        body = assignment[:, :, state.prefix :] + (windows * (left - state.prefix)).unsqueeze(1)
        return torch.cat([assignment[:, 0, : state.prefix], body.flatten(1)], 1)

    def left(self, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """The remaining tokens; if anything was merged, they are ordered by windows and include padding."""
        if state.window is None:
            return x
        rows, columns = window_counts(state.grid, state.window)
        whole = x.shape[1] == state.prefix + rows * state.window[0] * columns * state.window[1]
        return self._leave(x, state) if whole else x

    def assignment(self, state: TokenState) -> torch.Tensor | None:
        tokens = self.reducer.assignment(state)
        if tokens is None or state.window is None:
            return tokens
        return self._leave(tokens.unsqueeze(2), state).squeeze(2)

    def restored(self, x: torch.Tensor, state: TokenState, mode: str) -> torch.Tensor:
        x = self.reducer.restored(x, state, mode)
        return x if state.window is None else self._leave(x, state)

    @staticmethod
    def _leave(x: torch.Tensor, state: TokenState) -> torch.Tensor:
        front, body = x.tensor_split([state.prefix], 1)
        return torch.cat([front, from_windows(body, state.grid, state.window)], 1)


def within(reducer: Reducer, window: int | None, depth: int, global_blocks: Sequence[int] | None) -> Reducer:
    """The reducer in windows, or unchanged if `window` is None; arguments as in `Windows`."""
    if window is not None:
        return Windows(reducer, window, depth, global_blocks)
    if global_blocks is not None:
        raise InputError("global_blocks says which blocks attend beyond windows, and there is no window")
    return reducer

"""Isotropic backbones: one stride, one width, features after every block."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from torch import nn

from terrazzo.backbones._backbone import Backbone
from terrazzo.backbones._checks import check_image, whole
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._hosted import hosted
from terrazzo.backbones._layers import resized, whole_patches
from terrazzo.backbones._states import run
from terrazzo.backbones._tokens import RESTORE, Reducer, State
from terrazzo.backbones._windows import within
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.exporting import is_exporting


class Plain(Backbone):
    """A backbone whose units are blocks of one width on one grid."""

    units_name = "blocks"

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], channels: int, reduction: int, **kwargs):
        """Args: see `Backbone`; `reduction` is the stride of the stem."""
        super().__init__(stem, blocks, [channels] * len(blocks), [reduction] * len(blocks), **kwargs)

    def run_unit(self, unit: nn.Module, x: torch.Tensor, state: Any) -> torch.Tensor:
        return run(unit, x, state, self.grad_checkpointing)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from stem to head, for layer-wise learning rate decay."""
        return dict(stem=r"^stem", blocks=[(r"^blocks\.(\d+)", None), (r"^norm\d*", (99999,))])


class TokenStem(nn.Module):
    """Patches, a class token and learned positions: (B, in_chans, H, W) to (B, 1 + H/p W/p, C).

    Positions are resized bicubically to any other grid.
    """

    def __init__(self, patches: nn.Module, dim: int, grid: tuple[int, int], **factory):
        """Args:
        patches: Maps the image to (B, C, H, W); if it is a single convolution, images are padded to whole patches.
        grid: The grid of the learned positions.
        """
        super().__init__()
        self.grid = grid
        self.patch_size = patches.stride[0] if isinstance(patches, nn.Conv2d) else 1
        self.patches = patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], dim, **factory))
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        """Args:
        state: A `State`, which gets the image's grid; None for no state.
        """
        x = self.patches(whole_patches(x, self.patch_size))
        grid = tuple(x.shape[2:])
        if state is not None:
            state.grid = grid
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return x + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The positions of a grid, (1, 1 + H W, C).

        In exports and compiled models they are matrix products (`_layers.resized`).
        """
        if not (torch.compiler.is_compiling() or is_exporting()):
            return resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid))
        learned = resized(self.pos_embed[:, 1:].unflatten(1, self.grid), grid, antialias=True)
        return torch.cat([self.pos_embed[:, :1], learned.flatten(1, 2)], 1)


class PlainViT(Plain):
    """A plain ViT with a reducer that may merge or park tokens; its maps still have every position.

    The classifier reads the remaining class token; maps are restored (`terrazzo.backbones._tokens.RESTORE`). With a
    reducer that reduces nothing, the result equals the plain ViT's, to the bit.
    """

    no_decay = ("cls_token", "pos_embed")
    gives_tokens = True

    def __init__(
        self,
        patches: nn.Module,
        blocks: Sequence[nn.Module],
        channels: int,
        reducer: Reducer | None = None,
        restore: str = "delta",
        full_last: int | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        grid: tuple[int, int] = (14, 14),
        reduction: int = 16,
        global_pool: str = "token",
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        norm_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        patches: Maps the image to (B, C, H, W).
        blocks: timm's blocks; they become hosts (`terrazzo.backbones._hosted`).
        reducer: Runs the blocks; None for a reducer that reduces nothing.
        restore: "copy", "delta" or "soft": how positions are restored in maps.
        full_last: The number of last blocks that run on restored tokens whenever maps are requested, so that parked and
            merged positions see the final tokens (last-layer fusion, arXiv 2412.00965). These blocks attend to the
            whole image. None for 1 with `norm_outputs`, else 0. Classification alone never restores.
        window: For large images: blocks attend and merge within square windows of the grid with a side of at most this
            many patches; None for the whole image (`terrazzo.backbones._windows`).
        global_blocks: With `window`: blocks that attend to the whole image; None for the last block of each quarter.
        grid: The grid of the learned positions.
        **kwargs: in_chans, norm_layer: see `Backbone`.

        Raises:
            InputError: `restore` is not one of the modes, `full_last` is not a number of blocks, or `window` and
                `global_blocks` do not fit the reducer (`_windows.Windows`).
        """
        if not isinstance(restore, str) or restore not in RESTORE:
            raise InputError(f"restore must be one of {', '.join(RESTORE)}, got {restore!r}")
        full_last = int(norm_outputs) if full_last is None else whole("full_last", full_last)
        if not 0 <= full_last <= len(blocks):
            raise InputError(f"full_last must be 0 to the {len(blocks)} blocks, got {full_last}")
        reducer = within(Reducer() if reducer is None else reducer, window, len(blocks), global_blocks)
        factory = dict(device=device, dtype=dtype)
        stem = TokenStem(patches, channels, grid, **factory)
        super().__init__(
            stem,
            [hosted(block) for block in blocks],
            channels,
            reduction,
            num_classes=num_classes,
            drop_rate=drop_rate,
            norm_outputs=norm_outputs,
            **factory,
            **kwargs,
        )
        self.head = TokenHead(channels, num_classes, global_pool, drop_rate, **factory)
        self.reducer = reducer
        self.restore = restore
        self.full_last = full_last
        self.depth = len(blocks)

    def begin(self, x: torch.Tensor, maps: bool = True, **choices) -> tuple[torch.Tensor, State]:
        """Args:
        choices: Further arguments of the reducer's `begin`, for one forward pass.
        """
        state = self.reducer.begin((0, 0), 1, 0, maps, **choices)
        return self.stem(x, state), state

    def run_unit(self, unit: nn.Module, x: torch.Tensor, state: State) -> torch.Tensor:
        if state.maps and state.depth == self.depth - self.full_last:
            x = self.reducer.finished(x, state, self.restore)
        return super().run_unit(unit, x, state)

    def to_map(self, x: torch.Tensor, state: State) -> torch.Tensor:
        return self.reducer.restored(x, state, self.restore)[:, state.prefix :].unflatten(1, state.grid)

    def to_features(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """Normalised tokens (B, T, C): the remaining tokens, or one for every position if the head pools positions."""
        if self.head.of_positions:
            return self.norm(self.reducer.restored(x, state, "copy"))
        return self.norm(self.reducer.left(x, state))

    def forward_features(self, x: torch.Tensor, **choices) -> torch.Tensor:
        """(B, in_chans, H, W) to normalised tokens (B, T, C); the reducer decides T. `choices`: see `begin`."""
        check_image(x, self.in_chans)
        x, state = self.begin(x, maps=self.head.of_positions, **choices)
        for unit in self.blocks:
            x = self.run_unit(unit, x, state)
        return self.to_features(x, state)

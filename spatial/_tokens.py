"""Tokens of a plain model over ranks: a rank has the tokens in front (class token, registers) and its rows' tokens."""

from typing import Any

import torch
from torch import nn

from terrazzo.backbones._layers import bicubic
from terrazzo.errors import InputError
from terrazzo.spatial._operators import convolve
from terrazzo.spatial._part import Part


def begin(part: Part, patches: torch.Tensor, prefix: int = 0) -> None:
    """Remember which map the tokens are.

    Args:
        patches: (B, C, h, W).
        prefix: The number of tokens in front.
    """
    part.tokens, part.prefix = part.level(patches), prefix


def stem(part: Part, module: nn.Module, x: torch.Tensor, state: Any = None, any_grid: bool = False) -> torch.Tensor:
    """Patches by one convolution, a class token and learned positions: `terrazzo.backbones._plain.TokenStem`.

    Args:
        any_grid: Whether the table of positions fits every grid with as many patches.
    """
    x = convolve(part, module.patches, x, (module.patch_size - 1,) * 2)
    begin(part, x, prefix=1)
    if state is not None:
        state.grid = tuple(x.shape[2:])
    level, learned = part.level(x), module.pos_embed[:, 1:]
    fits = any_grid and level.height * level.width == learned.shape[1]
    learned = positions(part, learned, (level.height, level.width) if fits else module.grid)
    tokens = torch.cat([module.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
    return tokens + torch.cat([module.pos_embed[:, :1], learned], 1)


def positions(part: Part, learned: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The learned positions (1, N, C) of a grid for the own rows, resized bicubically to a map of another size."""
    level = part.tokens
    assert level is not None
    first, last = level.rows[part.rank]
    if (level.height, level.width) == tuple(grid):
        return learned[:, first * level.width : last * level.width]
    learned = learned.unflatten(1, grid)
    sides = zip(grid, (level.height, level.width))
    rows, columns = (bicubic(old, new, learned, antialias=True) for old, new in sides)
    return (rows[first:last] @ (columns @ learned).flatten(2)).unflatten(2, (level.width, -1)).flatten(1, 2)


def counted(part: Part, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The tokens that this rank adds to sums or keys: tokens in front are the first rank's.

    Args:
        dim: The dimension of the tokens: 1 for (B, T, C), 2 for (B, heads, T, D).
    """
    return x if part.rank == 0 else x.narrow(dim, part.prefix, x.shape[dim] - part.prefix)


def all_tokens(part: Part, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All ranks' tokens of tensors (B, heads, T, D) with as many heads, each token once and in its order."""
    widths = [x.shape[3] for x in tensors]
    return part.joined(counted(part, torch.cat(tensors, 3), 2), 2, counts(part)).split(widths, 3)


def counts(part: Part) -> list[int]:
    """The number of counted tokens of each rank.

    Raises:
        InputError: No stem has made tokens of a map.
    """
    level = part.tokens
    if level is None:
        raise InputError(f"{part.at} attends to tokens, and no known stem has made them of a map")
    return [
        (end - start) * level.width + (part.prefix if rank == 0 else 0) for rank, (start, end) in enumerate(level.rows)
    ]

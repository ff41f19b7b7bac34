"""Tokens of a plain model over ranks: a rank has the tokens in front (class token, registers) and its rows' tokens."""

import torch

from terrazzo.errors import InputError
from terrazzo.spatial._part import Part


def begin(part: Part, patches: torch.Tensor, prefix: int = 0) -> None:
    """Remember which map the tokens are.

    Args:
        patches: (B, C, h, W).
        prefix: The number of tokens in front.
    """
    part.tokens, part.prefix = part.level(patches), prefix


def counted(part: Part, x: torch.Tensor) -> torch.Tensor:
    """The tokens (B, T, C) that this rank adds to sums or keys: tokens in front are the first rank's."""
    return x if part.rank == 0 else x[:, part.prefix :]


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

"""Scores of tiles that need no training: how unsure the coarse pass is."""

from collections.abc import Callable

import torch
from torch import Tensor

from terrazzo.gated_zoom._tiles import Grid


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities of classes (B, C, H, W); a single channel is a foreground, and becomes two classes."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return logits.float().softmax(1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each pixel's classes, (B, 1, H, W), from 0 for a sure pixel to 1 for equal probabilities."""
    p = probabilities(logits)
    highest = torch.log(torch.tensor(float(p.shape[1])))
    return torch.special.entr(p).sum(1, keepdim=True) / highest.to(p)


def margin(logits: Tensor) -> Tensor:
    """1 - (highest probability - second highest), (B, 1, H, W), from 0 for a sure pixel to 1 for a tie."""
    best = probabilities(logits).topk(2, 1).values
    return 1 - (best[:, :1] - best[:, 1:])


UNTRAINED: dict[str, Callable[[Tensor], Tensor]] = {"entropy": entropy, "margin": margin}
"""Scores of pixels, by name. "random" is the baseline that every other score must beat."""


def tile_scores(name: str, logits: Tensor, grid: Grid) -> Tensor:
    """Scores of tiles from the logits of the coarse pass.

    Args:
        name: "entropy", "margin" or "random".
        logits: (B, C, h, w).
        grid: The tiles.

    Returns:
        (B, rows, columns).
    """
    if name == "random":
        return torch.rand(len(logits), grid.rows, grid.columns, device=logits.device)
    return grid.pool(UNTRAINED[name](logits))[:, 0]

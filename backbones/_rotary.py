"""Rotary positions of tokens that were merged or dropped.

timm's rotary positions hold sines and cosines, side by side in the last axis. They are (N, 2 D) for N patches, or
(heads, N, 2 D) if heads differ. Positions that differ between images are (B, heads or 1, M, 2 D).

A dropped token takes its position with it. A merged token stands at the circular mean of its patches' angles, for each
frequency: the mean of their (sin, cos), with length 1. This needs no coordinates, so it serves every kind of rotary
position. The alternative is the angle at the mean of the patches' coordinates. Both agree for neighbours, and for
frequencies that turn little between the patches.
"""

import torch
import torch.nn.functional as F

from terrazzo.kernels.token_reduction import Plan, merge

SHORTEST = 1e-3  # angles of a shorter mean cancel out; its direction would be noise, with a huge gradient


def pooled(rope: torch.Tensor, standing: Plan, weight: torch.Tensor | None, prefix: int) -> torch.Tensor:
    """The mean (sin, cos) of the patches that each token stands for: (B, heads or 1, M, 2 D).

    Args:
        standing: For each of `prefix` + N tokens, the token of `prefix` + M that stands for it.
        weight: (B, prefix + N), patches that each of the N stands for; None for 1 each.
    """
    plan = Plan(standing.map[:, prefix:] - prefix, standing.M - prefix)
    rope = rope if rope.dim() > 2 else rope.unsqueeze(0)
    tokens = rope.expand(plan.map.shape[0], -1, -1, -1).transpose(1, 2)
    means = merge(tokens.flatten(2), plan, None if weight is None else weight[:, prefix:])[0]
    return means.unflatten(2, tokens.shape[2:]).transpose(1, 2)


def unit(mean: torch.Tensor) -> torch.Tensor:
    """Mean (sin, cos) as (sin, cos) of an angle; a mean that is nearly 0 is no angle, and stays short."""
    return F.normalize(mean.unflatten(-1, (2, -1)), dim=-2, eps=SHORTEST).flatten(-2)


def taken(rope: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The positions of some patches of each image, (B, M): (B, heads or 1, M, 2 D)."""
    rope = rope if rope.dim() > 2 else rope.unsqueeze(0)
    return rope[:, index].transpose(0, 1)


def with_front(rope: torch.Tensor, prefix: int) -> torch.Tensor:
    """Positions of `prefix` tokens in front, which are not turned, and of patches: (..., prefix + N, 2 D)."""
    sin, cos = rope.new_zeros(*rope.shape[:-2], prefix, rope.shape[-1]).chunk(2, -1)
    return torch.cat([torch.cat([sin, cos + 1], -1), rope], -2)

"""What a model loses if the part of its tokens that tells objects apart is disturbed in one block.

After Y. Li and others, arXiv 2510.24709, section 4. The exact form is ours: the rows of the low-rank readout's P span
the binding subspace, and a random subspace that holds as much of the tokens' variance is the control, which the paper
does not have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_DRAWS = 256


class Subspace:
    """A part of the channels' space, around a mean.

    Args:
        rows: (k, C), which span it.
        mean: (C,), of the tokens.
    """

    def __init__(self, rows: Tensor, mean: Tensor):
        self.basis = torch.linalg.qr(rows.double().T)[0].T.to(mean)
        self.mean = mean

    def part(self, tokens: Tensor) -> Tensor:
        """The part of tokens (..., C), less their mean, that lies in the subspace."""
        return (tokens - self.mean) @ self.basis.T @ self.basis

    def energy(self, tokens: Tensor) -> float:
        """The share of the tokens' variance in the subspace."""
        return (self.part(tokens).square().sum() / (tokens - self.mean).square().sum().clamp(min=1e-12)).item()


def random_like(subspace: Subspace, tokens: Tensor, seed: int = 0) -> Subspace:
    """A random subspace of the same dimension, of many drawn the one whose share of the variance is nearest.

    Args:
        subspace: to be like.
        tokens: (N, C).
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted, count = subspace.energy(tokens), len(subspace.basis)
    directions = torch.linalg.svd(tokens - subspace.mean, full_matrices=False)[2]
    drawn = []
    for _ in range(_DRAWS):
        # Few directions hold much of the variance: begin the draw anywhere in their order, and mix what is drawn.
        most = int(torch.randint(count, len(directions) + 1, (1,), generator=generator))
        taken = directions[torch.randperm(most, generator=generator)[:count]]
        drawn.append(Subspace(torch.randn(count, count, generator=generator).to(taken) @ taken, subspace.mean))
    return min(drawn, key=lambda one: abs(one.energy(tokens) - wanted))


Change = Callable[[Tensor, Subspace], Tensor]
"""Tokens (N, C) of one image, without those in front, changed."""


def shuffle(share: float, seed: int = 0) -> Change:
    """Exchange the binding part among a share of an image's tokens."""

    def change(tokens: Tensor, subspace: Subspace) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        taken = torch.randperm(len(tokens), generator=generator)[: round(share * len(tokens))]
        if len(taken) < 2:
            return tokens
        part = subspace.part(tokens[taken])
        moved = tokens.clone()
        moved[taken] += part[torch.randperm(len(taken), generator=generator)] - part
        return moved

    return change


def inject(objects: Tensor, alpha: float) -> Change:
    """Move the binding part of each token to the mean of its object's tokens; `alpha` is what stays.

    Args:
        objects: (N,), the object of each token; tokens below 0 stay.
        alpha: from 0 to 1.
    """

    def change(tokens: Tensor, subspace: Subspace) -> Tensor:
        if alpha == 1:
            return tokens
        part, moved = subspace.part(tokens), tokens.clone()
        for number in objects[objects >= 0].unique():
            inside = objects == number
            moved[inside] += (1 - alpha) * (part[inside].mean(0) - part[inside])
        return moved

    return change


def zero(tokens: Tensor, subspace: Subspace) -> Tensor:
    """Remove the binding part."""
    return tokens - subspace.part(tokens)


@contextmanager
def changed_block(block: nn.Module, front: int, subspace: Subspace, change: Change) -> Iterator[None]:
    """Inside this context, a block's output (B, front + N, C) is changed behind its `front` tokens."""

    def hook(module: nn.Module, given: tuple, found: Tensor) -> Tensor:
        changed = [torch.cat([x[:front], change(x[front:], subspace)]) for x in found]
        return torch.stack(changed)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

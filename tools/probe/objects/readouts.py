"""Readouts that say of two positions whether they belong to one object, from the features of both.

Y. Li and others, "Does Object Binding Naturally Emerge in Large Pretrained Vision Transformers?", arXiv 2510.24709.
All readouts are symmetric: x and y may change places. The low-rank form is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """w.x + w.y + b, which can say that something is an object, and not that two things are the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N, N) of features (B, N, channels)."""
        found = self.weight(x) - self.weight.bias / 2
        return found + found.mT


class Diagonal(nn.Module):
    """The sum over channels of w_i x_i y_i, and b."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N, N) of features (B, N, channels)."""
        return (x * self.weight.weight) @ x.mT + self.weight.bias


class Quadratic(nn.Module):
    """x^T W y + b with W = (A + A^T) / (2 sqrt(channels)), as in the authors' code."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Linear(channels, channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def matrix(self) -> Tensor:
        """W, symmetric."""
        weight = self.weight.weight
        return (weight + weight.mT) / (2 * math.sqrt(weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N, N) of features (B, N, channels)."""
        return x @ self.matrix() @ x.mT + self.bias


class LowRank(nn.Module):
    """(P x)^T S (P y) + b with P of `rank` rows and S diagonal; the rows of P span the binding subspace."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.project = nn.Linear(channels, rank, bias=False)
        self.signs = nn.Parameter(torch.full((rank,), 1 / math.sqrt(channels)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N, N) of features (B, N, channels)."""
        found = self.project(x)
        return (found * self.signs) @ found.mT + self.bias


READOUTS: dict[str, Callable[[int], nn.Module]] = {
    "linear": Linear,
    "diag": Diagonal,
    "quad": Quadratic,
    "quad-16": lambda channels: LowRank(channels, min(16, channels)),
    "quad-64": lambda channels: LowRank(channels, min(64, channels)),
}


@dataclass(frozen=True)
class Sampled:
    """Sampled positions of pictures, filled up to the same number.

    Attributes:
        features: (pictures, N, channels).
        objects: (pictures, N), the number of the object inside its picture; 0 is the background; -1 fills up.
        categories: (pictures, N), the object's category.
        places: (pictures, N, 2), row and column of the cell.
    """

    features: Tensor
    objects: Tensor
    categories: Tensor
    places: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Which pairs count (pictures, N, N): each pair of two positions once; and which of these are one object."""
        known = self.objects >= 0
        count = known.shape[1]
        upper = torch.ones(count, count, dtype=torch.bool).triu(1)
        return known[:, :, None] & known[:, None] & upper, self.objects[:, :, None] == self.objects[:, None]

    def mixed(self) -> bool:
        """Whether there are pairs of one object, and pairs of two."""
        counts, same = self.pairs()
        return bool((counts & same).any() and (counts & ~same).any())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel; the deviation is not zero."""
        known = self.features[self.objects >= 0]
        deviation = known.std(0)
        return known.mean(0), deviation.clamp(min=1e-6 * float(deviation.max()) + 1e-12)

    def standardised(self, by: "Sampled") -> "Sampled":
        """Features less the mean, over the deviation, of the features of `by`."""
        mean, deviation = by.moments()
        return replace(self, features=(self.features - mean) / deviation)


@dataclass(frozen=True)
class Training:
    """How a readout is trained: Adam on batches of pictures.

    Attributes:
        steps: number of batches.
        batch: pictures of a batch.
        rate: learning rate.
        decay: weight decay.
        seed: of the weights and of the batches.
    """

    steps: int = 300
    batch: int = 16
    rate: float = 1e-3
    decay: float = 0.0
    seed: int = 0


def fit(name: str, data: Sampled, training: Training) -> nn.Module:
    """Train a readout with binary cross-entropy over the pairs inside of pictures.

    Args:
        name: of `READOUTS`.
        data: standardised training positions, `mixed`.
        training: how to train.
    """
    counts, same = data.pairs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        readout = READOUTS[name](data.features.shape[2])
    optimizer = torch.optim.Adam(readout.parameters(), training.rate, weight_decay=training.decay)
    generator = torch.Generator().manual_seed(training.seed)
    usable = counts.flatten(1).any(1).nonzero()[:, 0]
    for _ in range(training.steps):
        taken = usable[torch.randperm(len(usable), generator=generator)[: training.batch]]
        logits = readout(data.features[taken])[counts[taken]]
        loss = F.binary_cross_entropy_with_logits(logits, same[taken][counts[taken]].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return readout.eval()

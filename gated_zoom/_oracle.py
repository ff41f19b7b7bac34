"""What a perfect choice of tiles would gain on a data set, from label maps alone, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Oracle:
    """What replacing the worst tiles by the truth gives, at a coarse factor.

    Attributes:
        factor: How many times coarser the coarse labels are.
        shares: The shares of the tiles that are replaced, the first of them 0.
        confusions: For each share the counts of (true, found) classes over the data set, (classes, classes).
        captured: For each share of the tiles the share of their wrong pixels, as a mean over the pictures.
    """

    factor: int
    shares: Sequence[float]
    confusions: Sequence[np.ndarray]
    captured: Sequence[float]

    def ious(self, position: int) -> np.ndarray:
        """The IoU of each class in percent, at a position of `shares`; NaN for a class that is never there."""
        matrix = self.confusions[position].astype(float)
        both = np.diag(matrix)
        with np.errstate(invalid="ignore"):
            return 100 * both / (matrix.sum(0) + matrix.sum(1) - both)


def coarse_labels(labels: np.ndarray, factor: int, classes: int) -> np.ndarray:
    """The most frequent class of each `factor` x `factor` pixels, repeated, (H, W).

    Args:
        labels: (H, W); values from `classes` on are ignored. A block of ignored pixels alone gets class 0.
    """
    height, width = labels.shape
    rows, columns = -(-height // factor), -(-width // factor)
    padded = np.full((rows * factor, columns * factor), classes)
    padded[:height, :width] = np.minimum(labels, classes)
    blocks = padded.reshape(rows, factor, columns, factor).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
    counts = np.stack([(blocks == number).sum(-1) for number in range(classes)])
    return counts.argmax(0).repeat(factor, 0).repeat(factor, 1)[:height, :width]


def label_oracle(
    maps: Sequence[np.ndarray], classes: int, factor: int, tile: int, shares: Sequence[float] = (0, 0.1, 0.2, 0.3, 0.5)
) -> Oracle:
    """Replace the tiles of coarse labels with the most errors by the truth.

    Tiles lie in the picture as a whole: what is left at the bottom and at the right is never replaced.

    Args:
        maps: Label maps (H, W); values from `classes` on are ignored.
        classes: Number of classes.
        factor: How many times coarser the coarse labels are.
        tile: Side of a tile in pixels.
        shares: Shares of each picture's tiles.
    """
    confusions = [np.zeros((classes, classes), np.int64) for _ in shares]
    captured: list[list[float]] = [[] for _ in shares]
    for labels in maps:
        coarse, valid = coarse_labels(labels, factor, classes), labels < classes
        wrong = (coarse != labels) & valid
        rows, columns = labels.shape[0] // tile, labels.shape[1] // tile
        inside = wrong[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile)
        errors = inside.sum((1, 3)).ravel()
        order = np.argsort(-errors, kind="stable")
        for position, share in enumerate(shares):
            chosen = order[: round(share * len(order))]
            replaced = np.zeros(rows * columns, bool)
            replaced[chosen] = True
            found = coarse.copy()
            area = replaced.reshape(rows, columns).repeat(tile, 0).repeat(tile, 1)
            found[: rows * tile, : columns * tile][area] = labels[: rows * tile, : columns * tile][area]
            pairs = labels[valid].astype(np.int64) * classes + found[valid]
            confusions[position] += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
            if errors.any():
                captured[position].append(errors[chosen].sum() / errors.sum())
    means = [float(np.mean(values)) if values else 0.0 for values in captured]
    return Oracle(factor, shares, confusions, means)

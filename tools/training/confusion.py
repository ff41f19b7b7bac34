"""Confusion matrices: how often what is true (rows) was taken for what (columns)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

OVERLAP = 0.5
"""The least IoU of a found box with a true box that it stands for."""

_NUMBERED, _NAMED = 15, 60


def of_labels(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Counts of (true, found) labels, (classes, classes); other labels, such as 255, do not count."""
    truth, found = truth.astype(np.int64).ravel(), found.astype(np.int64).ravel()
    valid = (truth >= 0) & (truth < classes) & (found >= 0) & (found < classes)
    return np.bincount(truth[valid] * classes + found[valid], minlength=classes**2).reshape(classes, classes)


def of_boxes(
    true_boxes: np.ndarray, true_labels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, size: int
) -> np.ndarray:
    """Counts of (true, found) labels of one picture's boxes, (size, size); the last row and column mean nothing.

    Each found box, the surest first, takes the free true box that it overlaps most, of any class.

    Args:
        true_boxes, boxes: N x 4 and M x 4: x1, y1, x2, y2.
        true_labels, labels: N and M class indices; found boxes have falling scores.
        size: number of classes + 1.
    """
    matrix = np.zeros((size, size), np.int64)
    overlaps, free = _overlaps(boxes, true_boxes), np.ones(len(true_boxes), bool)
    for row, label in zip(overlaps, labels):
        row = np.where(free, row, 0)
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and row[best] >= OVERLAP:
            free[best] = False
            matrix[true_labels[best], label] += 1
        else:
            matrix[-1, label] += 1
    for label in true_labels[free]:
        matrix[label, -1] += 1
    return matrix


def _overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of each of M boxes with each of N, M x N; 0 for two boxes without area."""
    return box_iou(*(torch.as_tensor(boxes, dtype=torch.float64) for boxes in (one, other))).nan_to_num().numpy()


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write a matrix as a PNG file: each row in percent of the row.

    Args:
        matrix: counts, true by found.
        names: of rows and columns.
        path: the file.
    """
    from matplotlib.figure import Figure

    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(names)
    side = float(np.clip(2.5 + 0.42 * count, 4.5, 20))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="prediction", ylabel="truth", title="% of each true class")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8)
    if count <= _NAMED:
        size = "small" if count <= 30 else "xx-small"
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= _NUMBERED:
        for row in range(count):
            for column in range(count):
                colour = "white" if shares[row, column] > 60 else "black"
                text = f"{shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
    figure.savefig(path, dpi=110, format="png")

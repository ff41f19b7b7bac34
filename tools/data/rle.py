"""Run lengths of a binary mask, as COCO writes them: plain numbers, column by column, starting with zeros."""

import numpy as np


def encode(mask: np.ndarray, size: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)) -> dict:
    """COCO's uncompressed run-length form of a mask.

    Args:
        mask: (h, w), true or nonzero inside.
        size: (H, W) of the picture; None for the mask's.
        corner: row and column of the picture where the mask begins; the picture is empty elsewhere.

    Returns:
        {"size": [H, W], "counts": [zeros, ones, zeros, ...]}, JSON-ready.
    """
    height, width = size or mask.shape
    (top, left), columns = corner, mask.shape[1]
    inside = np.zeros((height, columns), bool)
    inside[top : top + mask.shape[0]] = mask
    flat = np.concatenate([[False], inside.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + left * height
    ends = [] if len(edges) and edges[-1] == height * width else [height * width]
    counts = np.diff(np.concatenate([[0], edges, ends]).astype(np.int64))
    return {"size": [int(height), int(width)], "counts": counts.tolist()}


def decode(runs: dict) -> np.ndarray:
    """The (H, W) boolean mask of `encode`'s form."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape((height, width), order="F")

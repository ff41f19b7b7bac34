"""Run lengths of a binary mask, as COCO writes them: plain numbers, column by column, starting with zeros."""

import numpy as np


def encode(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length form of a mask.

    Args:
        mask: (H, W), true or nonzero inside.

    Returns:
        {"size": [H, W], "counts": [zeros, ones, zeros, ...]}, JSON-ready.
    """
    flat = np.concatenate([[False], np.asarray(mask, dtype=bool).ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": [int(side) for side in mask.shape], "counts": counts.tolist()}


def decode(runs: dict) -> np.ndarray:
    """The (H, W) boolean mask of `encode`'s form."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape((height, width), order="F")

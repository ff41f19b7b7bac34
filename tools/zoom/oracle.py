"""The figures of a label oracle as rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrazzo.gated_zoom._oracle import Oracle


@dataclass(frozen=True)
class OracleRow:
    """One figure.

    Attributes:
        metric: "mIoU", "IoU of the foreground" or "wrong pixels in the tiles", in percent.
        factor: How many times coarser the coarse labels are.
        share: The share of the tiles that were replaced.
        value: In percent.
        tile: Side of a tile in pixels.
        pictures: How many.
    """

    metric: str
    factor: float
    share: float
    value: float
    tile: float
    pictures: float


def rows_of(oracle: Oracle, names: Sequence[str], pictures: int, tile: int) -> list[OracleRow]:
    """The rows of an oracle; for background and foreground the IoU of the foreground alone."""
    binary = tuple(names) == ("background", "foreground")
    metric, rows = ("IoU of the foreground" if binary else "mIoU"), []
    for position, share in enumerate(oracle.shares):
        ious = oracle.ious(position)
        value = float(ious[1] if binary else np.nanmean(ious))
        rows.append(OracleRow(metric, oracle.factor, share, value, tile, pictures))
    for share, captured in zip(oracle.shares, oracle.captured):
        rows.append(OracleRow("wrong pixels in the tiles", oracle.factor, share, 100 * captured, tile, pictures))
    return rows

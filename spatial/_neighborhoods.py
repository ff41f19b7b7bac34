"""Neighborhood attention of a map that several ranks share."""

from terrazzo.spatial._cuts import Level
from terrazzo.spatial._part import Needs


def neighborhoods(level: Level, kernel: int, dilation: int) -> Needs:
    """Rows for each rank, so that neighborhood attention of these rows is exact on the own rows.

    `kernel // 2` steps beyond the own rows suffice: windows of own rows are shifted at true borders only, and residue
    classes and biases depend on differences of rows. The kernel wants at least kernel x dilation rows; a map with fewer
    rows goes to all ranks.

    Source: Dilated Neighborhood Attention Transformer, arXiv 2209.15001, section 3.
    """
    extent, least = kernel // 2 * dilation, min(kernel * dilation, level.height)
    needs = []
    for start, end in level.rows:
        low, high = max(0, start - extent), min(level.height, end + extent)
        high = min(level.height, max(high, low + least))
        needs.append((min(low, high - least), high))
    return needs

"""Windows of a map that several ranks share."""

from terrazzo.spatial._cuts import Level
from terrazzo.spatial._part import Needs


def windows(level: Level, side: int) -> Needs:
    """For each rank the rows of all windows that have some of its rows; windows begin at the first row of the map.

    A window whose rows belong to two ranks is computed by both, and each keeps its own rows. Where all ranks begin at
    multiples of the side, nothing is exchanged or computed twice.
    """
    return [(start // side * side, min(level.height, -(-end // side) * side)) for start, end in level.rows]

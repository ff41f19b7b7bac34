"""How the portable form cuts one axis into residue classes and query tiles. Integers only.

A residue class of a dilated axis is a separate undilated problem. Classes of equal length share all tables, so an axis
has at most two `Fold`s. Within a class of `members` positions a tile of `tile` queries attends to a halo of
`min(tile + kernel - 1, members)` keys, clamped into the class. Tiles with equal window masks and bias offsets form one
`Kind`. All interior tiles are one kind, so the mask of a map of any size stays as small as a tile's mask.
"""

from dataclasses import dataclass
from functools import lru_cache

# Measured on 2 CPU cores at kernel 7 (README.md): larger tiles waste work, smaller tiles copy each key too often.
_TILES = (7, 8)
_WHOLE = 16


@dataclass(frozen=True)
class Fold:
    """Residue classes [first, last) of an axis, each of `members` positions."""

    first: int
    last: int
    members: int

    @property
    def classes(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Kind:
    """Tiles of one axis that share a window mask.

    Attributes:
        tiles: Numbers of the tiles.
        queries: (tile,) per tile, the positions of its queries; past the end the last position repeats.
        real: Per tile and query, False if the position is a repeat.
        keys: First key of each tile's halo.
        halo: Number of keys.
        start: Per query, the first key of its window, relative to the halo.
        offset: Per query, the halo's first key minus the query.
    """

    tiles: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]
    real: tuple[tuple[bool, ...], ...]
    keys: tuple[int, ...]
    halo: int
    start: tuple[int, ...]
    offset: tuple[int, ...]


def folds(length: int, dilation: int) -> tuple[Fold, ...]:
    """The residue classes of an axis, grouped by their length."""
    members, longer = divmod(length, dilation)
    groups = []
    if longer:
        groups.append(Fold(0, longer, members + 1))
    if longer < dilation:
        groups.append(Fold(longer, dilation, members))
    return tuple(groups)


def tile_length(members: int, kernel: int) -> int:
    """The cheapest query tile, by the number of keys that all queries visit; a short axis is one tile.

    A tile that does not divide the axis costs a tenth more, because its last tiles form an additional kind.
    """
    if members <= _WHOLE:
        return members

    def cost(tile: int) -> float:
        padded = -(-members // tile) * tile
        return padded * min(tile + kernel - 1, members) * (1 if padded == members else 1.1)

    return min(_TILES, key=cost)


@lru_cache(maxsize=512)
def kinds(members: int, kernel: int) -> tuple[Kind, ...]:
    """Cut an undilated axis into tiles and group them by window mask."""
    tile = tile_length(members, kernel)
    halo = min(tile + kernel - 1, members)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int, tuple[int, ...]]]] = {}
    for number in range(-(-members // tile)):
        first_key = min(max(number * tile - kernel // 2, 0), members - halo)
        queries = tuple(min(number * tile + i, members - 1) for i in range(tile))
        start = tuple(min(max(query - kernel // 2, 0), members - kernel) - first_key for query in queries)
        offset = tuple(first_key - query for query in queries)
        groups.setdefault((start, offset), []).append((number, first_key, queries))
    return tuple(
        Kind(
            tiles=tuple(number for number, _, _ in group),
            queries=tuple(queries for _, _, queries in group),
            real=tuple(
                tuple(number * tile + i == query for i, query in enumerate(queries)) for number, _, queries in group
            ),
            keys=tuple(first_key for _, first_key, _ in group),
            halo=halo,
            start=start,
            offset=offset,
        )
        for (start, offset), group in groups.items()
    )

"""Where tiles lie, and which pixels are whose."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Report = Callable[[int, int], None]
"""Is told how many tiles of a picture are done, and how many there are."""


class Span(NamedTuple):
    """A tile along one axis.

    Attributes:
        start, end: the pixels that it sees; the end may lie beyond the picture if that was lengthened.
        first, last: the pixels that are its own: from the seam to the neighbour before it, to the seam behind it.
    """

    start: int
    end: int
    first: int
    last: int

    @property
    def own(self) -> slice:
        """Its own pixels, counted from its start."""
        return slice(self.first - self.start, self.last - self.start)


class Grid(NamedTuple):
    """The tiles of a picture.

    Attributes:
        rows, columns: the tiles along both axes; all tiles in a row have one size.
        ramp: the pixels around each seam in which two tiles are blended; 0 for hard seams.
    """

    rows: list[Span]
    columns: list[Span]
    ramp: int = 0

    @property
    def count(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return self.columns[-1].last, self.rows[-1].last


def lay(width: int, height: int, tile: int, overlap: int, ramp: int = 0, unit: int = 1) -> Grid:
    """Tiles for a picture; a side that is at most as long as a tile is not cut.

    Args:
        width, height: size of the picture.
        tile: side of a tile, a multiple of the unit.
        overlap: pixels that neighbours share, at least; an even multiple of the unit.
        ramp: as in `Grid`; at most `overlap`.
        unit: tiles begin at multiples of it, and the picture is lengthened to multiples of it.
    """
    return Grid(_spans(height, tile, overlap, unit), _spans(width, tile, overlap, unit), ramp // 2 * 2)


def _spans(length: int, tile: int, overlap: int, unit: int) -> list[Span]:
    """The last tile is shifted so that it ends with the axis: all tiles are whole."""
    total = -(-length // unit) * unit
    if total <= tile:
        return [Span(0, total, 0, length)]
    starts = [*range(0, total - tile, tile - overlap), total - tile]
    seams = [(before + tile + after) // 2 for before, after in itertools.pairwise(starts)]
    return [Span(start, start + tile, first, last) for start, first, last in zip(starts, [0, *seams], [*seams, length])]


def enlarged(grid: Grid, scale: int) -> Grid:
    """The grid of what is `scale` times as large."""
    rows, columns = (
        [Span(*(scale * place for place in span)) for span in spans] for spans in (grid.rows, grid.columns)
    )
    return Grid(rows, columns, scale * grid.ramp)


def zone(seam: int, ramp: int, span: Span) -> slice:
    """The pixels around a seam in which two tiles are blended, counted from the start of one of them."""
    return slice(seam - ramp // 2 - span.start, seam + ramp // 2 - span.start)


def weights(spans: Sequence[Span], index: int, ramp: int) -> torch.Tensor:
    """How much each pixel of a tile counts, (end - start); the weights of all tiles at a pixel add up to 1."""
    span = spans[index]
    out = torch.ones(span.end - span.start)
    rising = (torch.arange(ramp) + 0.5) / max(ramp, 1)
    if index > 0:
        place = zone(span.first, ramp, span)
        out[: place.start] = 0
        out[place] *= rising
    if index + 1 < len(spans):
        place = zone(span.last, ramp, span)
        out[place] *= rising.flip(0)
        out[place.stop :] = 0
    return out

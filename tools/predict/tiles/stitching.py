"""What tiles of a picture gave, put together band by band, so that the values of a whole picture never exist at once.

The values are a segmentor's logits or a restored picture's pixels. A grid counts them; it is `enlarged` if there are
more values than pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.tiles.grid import Grid, Span, weights, zone

Row = Callable[[int], Iterator[Tensor]]
"""From the number of a row of tiles to the values (C, h, w) of each of its tiles."""


class Band(NamedTuple):
    """Finished rows of a picture.

    Attributes:
        top: the first row.
        values: (..., rows, width).
    """

    top: int
    values: Tensor


@torch.inference_mode()
def seamed(tiles: Row, grid: Grid, finish: Callable[[Tensor], Tensor]) -> Iterator[Band]:
    """Each tile's own values, with hard seams.

    Args:
        finish: from values (C, h, w) to what is kept of them, (..., h, w).
    """
    for index, row in enumerate(grid.rows):
        band: Tensor | None = None
        for column, values in zip(grid.columns, tiles(index), strict=True):
            own = finish(values[:, row.own, column.own])
            if band is None:
                band = own.new_zeros(*own.shape[:-1], grid.size[0])
            band[..., column.first : column.last] = own
        assert band is not None
        yield Band(row.first, band)


@torch.inference_mode()
def blended(
    tiles: Row, grid: Grid, finish: Callable[[Tensor], Tensor], meet: Callable[[Tensor, Tensor], None]
) -> Iterator[Band]:
    """Weighted sums of the values of tiles, for the rows of one row of tiles.

    Args:
        finish: as in `seamed`.
        meet: is given two tiles' values (C, h, w) of the same pixels.
    """
    rows, columns, ramp = grid.rows, grid.columns, grid.ramp
    across = [weights(columns, index, ramp) for index in range(len(columns))]
    carried: Tensor | None = None  # sums of rows that the next row of tiles goes on with
    above: list[Tensor] = []  # what the tiles above say about the rows around the seam
    for index, row in enumerate(rows):
        down = weights(rows, index, ramp)[:, None]
        total, beside, below = torch.empty(0), None, []
        for number, (column, values) in enumerate(zip(columns, tiles(index), strict=True)):
            values = values.float().cpu()
            if number == 0:
                total = values.new_zeros(len(values), row.end - row.start, columns[-1].end)
                if carried is not None:
                    total[:, : carried.shape[1]] = carried
            total[:, :, column.start : column.end] += values * (down * across[number])
            if beside is not None:
                meet(beside, values[:, :, zone(column.first, ramp, column)])
            if above:
                meet(above[number], values[:, zone(row.first, ramp, row)])
            beside = values[:, :, zone(column.last, ramp, column)].clone()
            below.append(values[:, zone(row.last, ramp, row)].clone())
        ready = (rows[index + 1].start if index + 1 < len(rows) else row.last) - row.start
        yield Band(row.start, finish(total[:, :ready, : grid.size[0]]))
        carried, above = total[:, ready:].clone(), below


def row_of_tiles(
    picture: Windows,
    grid: Grid,
    row: Span,
    batch: int,
    run: Callable[[Sequence[Image.Image], tuple[int, int]], Tensor],
    done: Callable[[int], None],
) -> Iterator[Tensor]:
    """The values (C, h, w) of each tile in a row of tiles.

    Args:
        grid: in the picture's pixels; a tile may reach beyond the picture.
        batch: how many tiles run together.
        run: from pictures and the size (h, w) of tiles to values (B, C, h, w), or (B, C, s h, s w).
        done: is told how many more tiles are done.
    """
    width, height = grid.size
    for first in range(0, len(grid.columns), batch):
        columns = grid.columns[first : first + batch]
        images = [
            picture.read(column.start, row.start, min(column.end, width), min(row.end, height)) for column in columns
        ]
        yield from run(images, (row.end - row.start, columns[0].end - columns[0].start))
        done(len(columns))

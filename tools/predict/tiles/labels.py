"""Label maps of tiles, put together band by band, so that logits never exist for a whole picture."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.tiles.grid import Grid, Span, weights, zone


class Segmentor(Protocol):
    """A segmentor in three steps."""

    def inputs(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Pictures as the model takes them, (B, 3, H, W), padded on the right and below to `size` (h, w), or to a
        file's fixed size.
        """
        ...

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, classes, h, w), for every pixel of the inputs."""
        ...

    def labels(self, logits: Tensor) -> Tensor:
        """Class indices (B, h, w) of logits (B, classes, h, w)."""
        ...


class Band(NamedTuple):
    """Finished rows of a picture.

    Attributes:
        top: the first row.
        labels: (rows, width) class indices.
    """

    top: int
    labels: Tensor


class Disagreement:
    """How far neighbouring tiles differ where they are blended."""

    def __init__(self) -> None:
        self.pixels, self.labels, self.probabilities = 0, 0, 0.0

    def add(self, one: Tensor, other: Tensor, labels: Callable[[Tensor], Tensor]) -> None:
        """Two tiles' logits (classes, h, w) of the same pixels."""
        size = one.shape[1] * one.shape[2]
        if not size:
            return
        found = [labels(logits[None]) for logits in (one, other)]
        likely = [logits.softmax(0) if len(logits) > 1 else logits.sigmoid() for logits in (one, other)]
        self.pixels += size
        self.labels += int((found[0] != found[1]).sum())
        self.probabilities += size * float((likely[0] - likely[1]).abs().mean())

    def record(self) -> dict[str, float]:
        """The share of pixels whose labels differ, and the mean absolute difference of the probabilities."""
        count = max(self.pixels, 1)
        return {"labels": round(self.labels / count, 6), "probabilities": round(self.probabilities / count, 6)}


def bands(
    segmentor: Segmentor,
    picture: Windows,
    grid: Grid,
    batch: int,
    done: Callable[[int], None],
    disagreement: Disagreement,
) -> Iterator[Band]:
    """The label map of a picture from the top to the bottom.

    Args:
        batch: how many tiles run together.
        done: is told how many more tiles are done.
        disagreement: learns how far tiles differ, if the grid blends them.
    """
    if grid.ramp:
        return _blended(segmentor, picture, grid, batch, done, disagreement)
    return _seamed(segmentor, picture, grid, batch, done)


@torch.inference_mode()
def _seamed(
    segmentor: Segmentor, picture: Windows, grid: Grid, batch: int, done: Callable[[int], None]
) -> Iterator[Band]:
    for row in grid.rows:
        labels = torch.zeros(row.last - row.first, grid.size[0], dtype=torch.int16)
        for column, logits in _tiles(segmentor, picture, grid, row, batch, done):
            own = logits[:, row.own, column.own]
            labels[:, column.first : column.last] = segmentor.labels(own[None])[0]
        yield Band(row.first, labels)


@torch.inference_mode()
def _blended(
    segmentor: Segmentor,
    picture: Windows,
    grid: Grid,
    batch: int,
    done: Callable[[int], None],
    disagreement: Disagreement,
) -> Iterator[Band]:
    """Weighted sums of logits, for the rows of one row of tiles."""
    rows, columns, ramp = grid.rows, grid.columns, grid.ramp
    across = [weights(columns, index, ramp) for index in range(len(columns))]
    carried: Tensor | None = None  # sums of rows that the next row of tiles goes on with
    above: list[Tensor] = []  # what the tiles above say about the rows around the seam
    for index, row in enumerate(rows):
        down = weights(rows, index, ramp)[:, None]
        total, beside, below = torch.empty(0), None, []
        for number, (column, logits) in enumerate(_tiles(segmentor, picture, grid, row, batch, done)):
            logits = logits.float().cpu()
            if number == 0:
                total = logits.new_zeros(len(logits), row.end - row.start, grid.size[0])
                if carried is not None:
                    total[:, : carried.shape[1]] = carried
            total[:, :, column.start : column.end] += logits * (down * across[number])
            if beside is not None:
                disagreement.add(beside, logits[:, :, zone(column.first, ramp, column)], segmentor.labels)
            if above:
                disagreement.add(above[number], logits[:, zone(row.first, ramp, row)], segmentor.labels)
            beside = logits[:, :, zone(column.last, ramp, column)].clone()
            below.append(logits[:, zone(row.last, ramp, row)].clone())
        ready = (rows[index + 1].start if index + 1 < len(rows) else row.end) - row.start
        yield Band(row.start, segmentor.labels(total[None, :, :ready])[0].to(torch.int16))
        carried, above = total[:, ready:].clone(), below


def _tiles(
    segmentor: Segmentor, picture: Windows, grid: Grid, row: Span, batch: int, done: Callable[[int], None]
) -> Iterator[tuple[Span, Tensor]]:
    """The logits (classes, h, w) of each tile in a row of tiles."""
    width, height = grid.size
    for first in range(0, len(grid.columns), batch):
        columns = grid.columns[first : first + batch]
        images = [
            picture.read(column.start, row.start, min(column.end, width), min(row.end, height)) for column in columns
        ]
        high, wide = row.end - row.start, columns[0].end - columns[0].start
        logits = segmentor.logits(segmentor.inputs(images, (high, wide)))
        yield from zip(columns, logits[:, :, :high, :wide], strict=True)  # a file may take larger images
        done(len(columns))

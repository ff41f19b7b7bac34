"""Label maps of tiles, put together band by band, so that logits never exist for a whole picture."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.tiles.grid import Grid
from terrazzo.tools.predict.tiles.stitching import Band, blended, row_of_tiles, seamed


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
    """The label map of a picture from the top to the bottom: values are class indices (rows, width).

    Args:
        batch: how many tiles run together.
        done: is told how many more tiles are done.
        disagreement: learns how far tiles differ, if the grid blends them.
    """

    def run(images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        return segmentor.logits(segmentor.inputs(images, size))[:, :, : size[0], : size[1]]  # a file may take larger

    def tiles(index: int) -> Iterator[Tensor]:
        return row_of_tiles(picture, grid, grid.rows[index], batch, run, done)

    def finish(logits: Tensor) -> Tensor:
        return segmentor.labels(logits[None])[0].to("cpu", torch.int16)

    if not grid.ramp:
        return seamed(tiles, grid, finish)
    return blended(tiles, grid, finish, lambda one, other: disagreement.add(one, other, segmentor.labels))

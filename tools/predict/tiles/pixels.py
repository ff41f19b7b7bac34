"""Restorers on pictures in tiles: blended, with hard seams, or exactly where the model does not look too far."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from terrazzo.degradations.pixels import to_image
from terrazzo.errors import InputError
from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.prediction import Prediction
from terrazzo.tools.predict.restorers import Restoring, restored_prediction
from terrazzo.tools.predict.tiles.grid import Grid, Report, enlarged, lay
from terrazzo.tools.predict.tiles.reach import measured_reach
from terrazzo.tools.predict.tiles.stitching import Band, blended, row_of_tiles, seamed


class PixelRun(NamedTuple):
    """A picture that is being restored.

    Attributes:
        bands: values (3, rows, s width) in 0..1, from the top to the bottom.
        facts: what the record says about the tiles, after the last band.
    """

    bands: Iterator[Band]
    facts: Callable[[], dict]


class PixelTiles:
    """A restorer on pictures in tiles.

    Args:
        restorer: what a predictor of a config, a network or a file gives.
        tile: side of a tile in pixels of the degraded picture.
        overlap: pixels that neighbours share, with a hard seam in the middle; "blend" for a ramp over a quarter of a
            tile; "auto" for the result of the whole picture.

    Raises:
        InputError: "auto" finds no overlap that is exact.
    """

    note = None

    def __init__(self, restorer: Restoring, tile: int, overlap: int | str):
        self.restorer, self.tile = restorer, tile
        self.how, self.unit, self.ramp = "hard", 1, 0
        if overlap == "auto":
            self.how, self.overlap = "exact", self._exact_overlap()
        elif overlap == "blend":
            self.how = "blend"
            self.overlap = self.ramp = tile // 4
        else:
            self.overlap = int(overlap)

    def _exact_overlap(self) -> int:
        if self.restorer.stride is None:
            raise InputError("a file does not say how far its model looks: use --overlap blend, or a number of pixels")
        self.unit = self.restorer.stride
        if self.tile % self.unit:
            raise InputError(
                f"exact tiles are multiples of the model's stride, {self.unit}: use --tile "
                f"{max(1, round(self.tile / self.unit)) * self.unit}, or --overlap blend"
            )
        # every value of a pixel's square is a channel of the pixel
        reach = measured_reach(
            lambda x: pixel_unshuffle(self.restorer.restored(x), self.restorer.scale), self.tile, self.unit
        )
        if reach is None:
            raise InputError(
                f"no overlap of tiles of {self.tile} pixels is exact, because the model looks too far or its results "
                "depend on where a tile begins; use --overlap blend, or larger tiles"
            )
        return 2 * reach

    def predict(self, picture: Windows, batch: int, report: Report) -> Prediction:
        """The prediction, with the whole restored picture; the record has `tiles`."""
        run = self.run(picture, batch, report)
        restored = to_image(torch.cat([band.values for band in run.bands], 1))
        image = picture.read(0, 0, picture.width, picture.height)
        found = restored_prediction(image, restored, self.restorer.scale)
        return dataclasses.replace(found, record={**found.record, "tiles": run.facts()})

    def run(self, picture: Windows, batch: int, report: Report) -> PixelRun:
        """Restore a picture that is read in parts; as `SegmentTiles.run`."""
        fits = max(picture.width, picture.height) <= self.tile
        unit, overlap = (1, 0) if fits else (self.unit, self.overlap)
        grid = lay(picture.width, picture.height, self.tile, overlap, 0 if fits else self.ramp, unit)
        scale, seen, apart = self.restorer.scale, [0], _Apart()

        def done(more: int) -> None:
            seen[0] += more
            report(seen[0], grid.count)

        def run(images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
            found = self.restorer.restored(self.restorer.inputs(images, size))
            return found[:, :, : size[0] * scale, : size[1] * scale]  # a file may take larger pictures

        def tiles(index: int) -> Iterator[Tensor]:
            return row_of_tiles(picture, grid, grid.rows[index], batch, run, done)

        large = enlarged(grid, scale)
        if grid.ramp:
            return PixelRun(blended(tiles, large, _as_they_are, apart.add), lambda: self._facts(grid, apart))
        return PixelRun(seamed(tiles, large, _as_they_are), lambda: self._facts(grid, apart))

    def _facts(self, grid: Grid, apart: "_Apart") -> dict:
        if grid.count == 1:
            return {"how": "whole"}
        facts = {"how": self.how, "size": self.tile, "overlap": self.overlap, "count": grid.count}
        return facts | ({"disagreement": apart.record()} if grid.ramp else {})


class _Apart:
    """How far neighbouring tiles differ where they are blended."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Two tiles' values (3, h, w) of the same pixels."""
        self.count += one.numel()
        self.sum += float((one - other).abs().sum())

    def record(self) -> dict[str, float]:
        """The mean absolute difference, of values in 0..255."""
        return {"values": round(255 * self.sum / max(self.count, 1), 4)}


def _as_they_are(values: Tensor) -> Tensor:
    return values

"""Segmentors on pictures in tiles."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._parallelize import largest_stride
from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.draw import Colour
from terrazzo.tools.predict.prediction import Prediction, label_prediction
from terrazzo.tools.predict.tiles.grid import Grid, Report, lay
from terrazzo.tools.predict.tiles.labels import Disagreement, Segmentor, bands
from terrazzo.tools.predict.tiles.reach import measured_reach
from terrazzo.tools.predict.tiles.rows import ByRows
from terrazzo.tools.predict.tiles.stitching import Band


class NamedSegmentor(Segmentor, Protocol):
    """A segmentor whose classes have names and colours."""

    def classes(self) -> tuple[list[str], list[Colour]]:
        """Names and colours of the classes, at the latest after the first tile."""
        ...


class Run(NamedTuple):
    """A picture that is being segmented.

    Attributes:
        bands: the label map from the top to the bottom.
        facts: what the record says about the tiles, after the last band.
    """

    bands: Iterator[Band]
    facts: Callable[[], dict]


class SegmentTiles:
    """A segmentor on pictures in tiles, at their own resolution.

    Args:
        segmentor: what a predictor of a config or of a file gives.
        tile: side of a tile in pixels.
        overlap: pixels that neighbours share, with a hard seam in the middle; "blend" for a ramp over a quarter of a
            tile; "auto" for the result of the whole picture.
        model: mmseg's model, for "auto"; None for an exported file.

    Attributes:
        note: what a user should know about the choice that "auto" made; None if there is nothing.

    Raises:
        InputError: the overlap does not fit, or "auto" finds no exact way.
    """

    def __init__(self, segmentor: NamedSegmentor, tile: int, overlap: int | str, model: nn.Module | None = None):
        self.segmentor, self.tile = segmentor, tile
        self.by_rows: ByRows | None = None
        self.note: str | None = None
        self.how, self.unit, self.ramp = "hard", 1, 0
        if overlap == "auto":
            self.how = "exact"
            self.overlap = self._exact_overlap(model)
        elif overlap == "blend":
            self.how = "blend"
            self.overlap = self.ramp = tile // 4
        else:
            self.overlap = int(overlap)

    def _exact_overlap(self, model: nn.Module | None) -> int:
        """The overlap of tiles that give the whole picture's result; 0 if `by_rows` does."""
        if model is None:
            raise InputError("a file does not say how far its model looks: use --overlap blend, or a number of pixels")
        self.unit = largest_stride(model)
        if self.tile % self.unit:
            raise InputError(
                f"exact tiles are multiples of the model's stride, {self.unit}: use --tile "
                f"{max(1, round(self.tile / self.unit)) * self.unit}, or --overlap blend"
            )
        with torch.inference_mode():
            reach = measured_reach(self.segmentor.logits, self.tile, self.unit)
        if reach is not None and reach <= self.tile // 4:
            return 2 * reach
        try:
            self.by_rows = ByRows(self.segmentor, model, self.tile)
        except InputError as error:
            if reach is None:
                raise InputError(
                    f"no overlap of tiles of {self.tile} pixels is exact, because the model looks too far or its "
                    f"results depend on where a tile begins, and {error}; use --overlap blend, or larger tiles"
                ) from None
            times = (self.tile / (self.tile - 2 * reach)) ** 2
            self.note = (
                f"the model looks {reach} pixels far, so pixels are computed {times:.1f} times; larger tiles cost less"
            )
            return 2 * reach
        self.note = (
            f"the model looks further than a quarter of a tile of {self.tile} pixels, or its results depend on where a "
            f"tile begins, so its layers run on {self.tile} rows at a time instead: exact, without tiles, with the "
            "whole picture in memory"
        )
        return 0

    def predict(self, picture: Windows, batch: int, report: Report) -> Prediction:
        """The prediction, with the whole label map; the record has `tiles`."""
        run = self.run(picture, batch, report)
        labels = np.concatenate([band.values.numpy() for band in run.bands])
        found = label_prediction(picture.read(0, 0, picture.width, picture.height), labels, *self.segmentor.classes())
        return dataclasses.replace(found, record={**found.record, "tiles": run.facts()})

    def run(self, picture: Windows, batch: int, report: Report) -> Run:
        """Segment a picture that is read in parts.

        Args:
            batch: how many tiles run together.
            report: is told about every batch.
        """
        size = (picture.width, picture.height)
        if self.by_rows is not None and max(size) > self.tile:
            return Run(self._reported(self.by_rows.bands(picture), report), lambda: {"how": "rows", "rows": self.tile})
        fits = max(size) <= self.tile
        grid = lay(*size, self.tile, 0 if fits else self.overlap, self.ramp, 1 if fits else self.unit)
        seen = [0]

        def done(more: int) -> None:
            seen[0] += more
            report(seen[0], grid.count)

        disagreement = Disagreement()
        found = bands(self.segmentor, picture, grid, batch, done, disagreement)
        return Run(found, lambda: self._facts(grid, disagreement))

    def _facts(self, grid: Grid, disagreement: Disagreement) -> dict:
        if grid.count == 1:
            return {"how": "whole"}
        facts = {"how": self.how, "size": self.tile, "overlap": self.overlap, "count": grid.count}
        return facts | ({"disagreement": disagreement.record()} if grid.ramp else {})

    @staticmethod
    def _reported(found: Iterator[Band], report: Report) -> Iterator[Band]:
        report(0, 1)
        yield from found
        report(1, 1)

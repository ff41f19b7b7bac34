"""Which engine runs a model on pictures in tiles."""

import dataclasses
from typing import Any, Protocol

from terrazzo.errors import InputError
from terrazzo.tools.data.windows import Windows
from terrazzo.tools.predict.classifiers import ClassPredictor
from terrazzo.tools.predict.prediction import Prediction
from terrazzo.tools.predict.restorers import Restoring
from terrazzo.tools.predict.tiles.grid import Report


class TileEngine(Protocol):
    """A model on pictures in tiles.

    Attributes:
        note: what a user should know about how it runs, or None.
    """

    note: str | None

    def predict(self, picture: Windows, batch: int, report: Report) -> Prediction:
        """The prediction for one picture.

        Args:
            picture: the picture.
            batch: how many tiles run together.
            report: is told after each batch how many tiles are done, and how many there are.
        """
        ...


def predicted(tiles: TileEngine, picture: Windows, facts: dict[str, Any], batch: int, report: Report) -> Prediction:
    """The prediction for one picture, with a record that begins with the facts of the picture and its size."""
    found = tiles.predict(picture, batch, report)
    record = {**facts, "width": picture.width, "height": picture.height, **found.record}
    return dataclasses.replace(found, record=record)


def check_tiles(tile: int | None, overlap: int | str | None) -> None:
    """Make sure that a tile's side and an overlap go together.

    Args:
        overlap: pixels, "auto", "blend", or None for the model's default.

    Raises:
        InputError: they do not.
    """
    if tile is None:
        if overlap is not None:
            raise InputError("an overlap is for tiles: say how large they are with --tile, or tile=... in Python")
        return
    if not isinstance(tile, int) or tile < 1:
        raise InputError(f"a tile has {tile!r} pixels on a side; it must be at least 1")
    if overlap is None or overlap in ("auto", "blend"):
        return
    if not isinstance(overlap, int) or not 0 <= overlap < tile:
        raise InputError(
            f"the overlap is {overlap!r}; it must be auto, blend or pixels from 0 to {tile - 1}, less than a tile"
        )


def tile_engine(engine: Any, tile: int, overlap: int | str | None) -> TileEngine:
    """An engine as one that cuts pictures into tiles.

    Args:
        engine: the engine of a config, whose preparation does not resize, or of a file.
        tile: side of a tile in pixels.
        overlap: as in `check_tiles`. None is "auto" for a segmentor, "blend" for a segmentor's file and a restorer,
            and a quarter of the tile for a detector.

    Raises:
        InputError: the model is of a kind that tiles cannot divide, or takes no tiles of this size or overlap.
    """
    size = getattr(engine, "size", None)
    if hasattr(engine, "things"):
        _check_file(size, tile)
        if isinstance(overlap, str):
            raise InputError(
                f"--overlap {overlap} is for segmentors: give a detector's tiles a number of pixels, larger than its "
                "things"
            )
        from terrazzo.tools.predict.tiles.boxes import BoxTiles

        return BoxTiles(engine, tile, tile // 4 if overlap is None else overlap)
    if isinstance(engine, Restoring):
        _check_file(size, tile)
        from terrazzo.tools.predict.tiles.pixels import PixelTiles

        return PixelTiles(engine, tile, "blend" if overlap is None else overlap)
    if hasattr(engine, "logits"):
        _check_file(size, tile)
        model = getattr(engine, "model", None)
        if model is not None and not hasattr(model, "encode_decode"):
            raise InputError(f"a {type(model).__name__} gives no logits for tiles: leave --tile out")
        from terrazzo.tools.predict.tiles.segments import SegmentTiles

        default = "blend" if model is None else "auto"
        return SegmentTiles(engine, tile, default if overlap is None else overlap, model)
    kind = "a classifier" if isinstance(engine, ClassPredictor) else "a panoptic segmentor"
    raise InputError(f"tiles are for segmentors, detectors and restorers, and this is {kind}: leave --tile out")


def _check_file(size: tuple[int, int] | None, tile: int) -> None:
    if size is None:
        return
    if size[0] != size[1]:
        raise InputError(
            f"the file takes images of {size[0]}x{size[1]}, and tiles are square: export it with a square --size, or "
            "with --dynamic hw"
        )
    if size != (tile, tile):
        raise InputError(
            f"the file takes images of {size[0]}x{size[1]}, not tiles of {tile}x{tile}: use tiles of its size, or "
            "export it with --dynamic hw"
        )

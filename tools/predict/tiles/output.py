"""Files of predictions for pictures in tiles: as for other pictures, or band by band for pictures read by windows."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from terrazzo._files import written_whole
from terrazzo.degradations.pixels import to_image
from terrazzo.tools.data.pictures import Picture
from terrazzo.tools.data.windows import WholePicture, Windows
from terrazzo.tools.predict.draw import box_overlay, tinted
from terrazzo.tools.predict.output import write_prediction
from terrazzo.tools.predict.prediction import box_record, box_tags, label_record
from terrazzo.tools.predict.tiles.boxes import BoxTiles
from terrazzo.tools.predict.tiles.engine import TileEngine, predicted
from terrazzo.tools.predict.tiles.grid import Report
from terrazzo.tools.predict.tiles.pixels import PixelTiles
from terrazzo.tools.predict.tiles.segments import SegmentTiles
from terrazzo.tools.predict.tiles.stitching import Band

_ROWS = 1024
"""Rows of an overlay with boxes that are drawn at once."""


def write_tiled(out: Path, picture: Picture, tiles: TileEngine, batch: int, report: Report) -> dict:
    """Predict a picture and write its files: NAME.json and the drawing; for a segmentor the label map, too.

    A picture that is read by windows gets NAME.overlay.tif and NAME.labels.tif, tiled and without a legend; or, from a
    restorer, NAME.restored.tif alone.

    Args:
        out: the folder.
        picture: the picture.
        tiles: the model.
        batch, report: as in `TileEngine.predict`.

    Returns:
        The record.
    """
    facts = {"picture": str(picture.path)}
    with picture.windows() as windows:
        if isinstance(windows, WholePicture):
            prediction = predicted(tiles, windows, facts, batch, report)
            write_prediction(out, picture.name, prediction)
            return prediction.record
        found = _writer(tiles)(out, picture.name, windows, tiles, batch, report)
        record = {**facts, "width": windows.width, "height": windows.height, **found}
        with written_whole(out / f"{picture.name}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
        return record


def _writer(tiles: TileEngine) -> Callable[..., dict]:
    if isinstance(tiles, PixelTiles):
        return _write_pixels
    return _write_labels if isinstance(tiles, SegmentTiles) else _write_boxes


def _write_pixels(out: Path, name: str, windows: Windows, tiles: PixelTiles, batch: int, report: Report) -> dict:
    from terrazzo.tools.data.tiled_tiff import TiledTiff

    scale, run = tiles.restorer.scale, tiles.run(windows, batch, report)
    size = {"width": windows.width * scale, "height": windows.height * scale}
    place = windows.georeference and windows.georeference.enlarged(scale)
    with TiledTiff(out / f"{name}.restored.tif", **size, channels=3, georeference=place) as restored:
        for band in run.bands:
            restored.write(0, band.top, np.asarray(to_image(band.values)))
    return {"task": "restoration", "scale": scale, "restored": size, "tiles": run.facts()}


def _write_labels(out: Path, name: str, windows: Windows, tiles: SegmentTiles, batch: int, report: Report) -> dict:
    from terrazzo.tools.data.tiled_tiff import TiledTiff

    run = tiles.run(windows, batch, report)
    first = next(run.bands)
    names, colours = tiles.segmentor.classes()
    size, georeference = (windows.width, windows.height), windows.georeference
    small = len(names) <= 256
    counts = np.zeros(len(names), np.int64)
    with contextlib.ExitStack() as files:
        maps = files.enter_context(
            TiledTiff(
                out / f"{name}.labels.tif",
                *size,
                dtype=np.uint8 if small else np.uint16,
                palette=colours if small else None,
                georeference=georeference,
            )
        )
        overlay = files.enter_context(
            TiledTiff(out / f"{name}.overlay.tif", *size, channels=3, lossy=True, georeference=georeference)
        )
        above = np.zeros((0, windows.width), np.int16)  # the last row waits for its lower neighbour, for the outlines
        for top, labels in _bands(first, run.bands):
            maps.write(0, top, labels.astype(maps.dtype))
            counts += np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
            both, start = np.concatenate([above, labels]), top - len(above)
            last = top + len(labels) == windows.height
            drawn = tinted(windows.read(0, start, windows.width, top + len(labels)), both, colours)
            overlay.write(0, start, drawn if last else drawn[:-1])
            above = labels[-1:]
    return {**label_record(counts, windows.width * windows.height, names), "tiles": run.facts()}


def _bands(first: Band, rest: Iterator[Band]) -> Iterator[tuple[int, np.ndarray]]:
    yield first.top, first.values.numpy()
    for band in rest:
        yield band.top, band.values.numpy()


def _write_boxes(out: Path, name: str, windows: Windows, tiles: BoxTiles, batch: int, report: Report) -> dict:
    from terrazzo.tools.data.tiled_tiff import TiledTiff

    found, masks, facts = tiles.found(windows, batch, report)
    names, colours = tiles.detector.classes()
    size = (windows.width, windows.height)
    record = box_record(size, found, masks, names, tiles.detector.min_score)
    texts, drawn = box_tags(record, colours)
    georeference = windows.georeference
    with TiledTiff(out / f"{name}.overlay.tif", *size, channels=3, lossy=True, georeference=georeference) as overlay:
        for top in range(0, size[1], _ROWS):
            rows = windows.read(0, top, size[0], min(top + _ROWS, size[1]))
            overlay.write(0, top, np.asarray(box_overlay(rows, found.boxes.numpy(), texts, drawn, masks, top, size)))
    return {**record, "tiles": facts}

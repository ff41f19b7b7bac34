"""TIFF and JPEG 2000 by windows, through rasterio (GDAL).

The rules for other types of samples are those of `terrazzo._pictures`. Where the values of the whole picture decide how
they become 8 bits (floats, signed and 32-bit integers), every opening reads the whole file, block by block: the values
of a single window must not decide, because its neighbours would differ. `terrazzo infer` opens a file twice, first to
check it.
"""

import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import rasterio
from affine import Affine
from PIL import Image, TiffImagePlugin
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from terrazzo._pictures import conversion_by_range, note, read_from_start, turned
from terrazzo._pixel_limit import check_pixels
from terrazzo.errors import InputError, first_line
from terrazzo.tools.data.windows import Windows

_CACHE_BYTES = 128 * 2**20
"""Memory for decoded blocks, which neighbouring windows share; 1024 rows of 20000 pixels are half of it.

GDAL's own choice is a twentieth of the machine's memory. rasterio gives the number on as bytes.
"""
_ORIENTATION = 274
_CODESTREAM = b"\xff\x4f\xff\x51"
"""How a codestream of JPEG 2000 begins: the markers SOC and SIZ."""
BAD_DIRECTORY = (SyntaxError, ValueError, struct.error, KeyError, TypeError, OSError)
"""What reading the tags of a damaged TIFF raises."""
_COLOURS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@dataclass(frozen=True)
class Georeference:
    """Where the pixels of a picture lie on the earth.

    Attributes:
        crs: the coordinate reference system (`rasterio.crs.CRS`), or None.
        transform: from (column, row) of the upright picture to coordinates.
    """

    crs: Any
    transform: Affine

    def enlarged(self, scale: int) -> "Georeference":
        """Where the pixels of the picture lie after each became `scale` x `scale` pixels."""
        a, b, c, d, e, f = self.transform[:6]
        return Georeference(self.crs, Affine(a / scale, b / scale, c, d / scale, e / scale, f))


class RasterWindows(Windows):
    """A TIFF or JPEG 2000 picture on disk.

    Args:
        file: a path, or a file open for reading bytes.
        driver: GDAL's name of the format. No other is tried, since some formats of GDAL name further files.
        name: what messages call the picture.

    Raises:
        InputError: the file cannot be read, holds samples of an unknown range, or has tiles or strips of too many
            pixels.
    """

    def __init__(self, file: str | Path | BinaryIO, driver: str, name: object):
        self._failure = f"picture {name} is damaged or of a kind that cannot be read"
        if driver != "GTiff":
            with read_from_start(file) as stream:
                check_pixels(f"a tile of picture {name}", *_tile_of_jpeg2000(stream, name))
        with gdal(self._failure), ExitStack() as stack:
            self._source = stack.enter_context(_open(file, driver))
            width, height = self._source.width, self._source.height
            rows, columns = self._source.block_shapes[0]
            check_pixels(f"a tile or strip of picture {name}", min(columns, width), min(rows, height))
            with read_from_start(file) as stream:
                turn = _orientation(stream) if driver == "GTiff" else 1
            super().__init__(name, *((height, width) if turn >= 5 else (width, height)))
            self._turn, self._stored = turn, _to_stored(turn, self.width, self.height)
            self.georeference = self._georeference()
            self._bands = self._choose_bands()
            self._convert = self._conversion()
            stack.pop_all()  # nothing failed: the file stays open

    def close(self) -> None:
        self._source.close()

    def _read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        (x0, x1), (y0, y1) = np.sort(self._stored[:2] @ [(left, right), (top, bottom), (1, 1)]).tolist()
        with gdal(self._failure):
            samples = self._source.read(self._bands, window=Window(x0, y0, x1 - x0, y1 - y0))  # C H W
        pixels = np.moveaxis(self._convert(samples), 0, -1)  # H W C
        return Image.fromarray(turned(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, self._turn)).convert("RGB")

    def _georeference(self) -> Georeference | None:
        crs, transform = self._source.crs, self._source.transform
        if crs is None and transform.is_identity:
            return None
        return Georeference(crs, Affine(*(np.reshape(transform, (3, 3)) @ self._stored)[:2].ravel().tolist()))

    def _choose_bands(self) -> list[int]:
        """The bands of red, green and blue, or the grey band, counted from 1."""
        if self._source.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE") == "CIELAB":
            raise InputError(f"picture {self.name} has CIELAB colours; save it in RGB")  # GDAL's differ from Pillow's
        meanings = self._source.colorinterp
        if all(colour in meanings for colour in _COLOURS):
            return [meanings.index(colour) + 1 for colour in _COLOURS]
        others = [band for band, meaning in enumerate(meanings, 1) if meaning != ColorInterp.alpha]
        chosen = others[:3] if len(others) >= 3 else others[:1]
        if len(others) not in (1, 3):
            note(f"{len(others)} bands without colours are shown by the first {len(chosen)}", self.name)
        return chosen

    def _conversion(self) -> Callable[[np.ndarray], np.ndarray]:
        """Stored samples (C, H, W) to uint8 (C or 3, H, W)."""
        source, band = self._source, self._bands[0]
        if source.colorinterp[band - 1] == ColorInterp.palette:
            colours = source.colormap(band)
            table = np.zeros((3, max(colours) + 1), np.uint8)
            for index, colour in colours.items():
                table[:, index] = colour[:3]
            return lambda samples: table[:, samples[0]]
        convert = self._to_8_bits(np.dtype(source.dtypes[band - 1]))
        if len(self._bands) == 1 and source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
            return lambda samples: 255 - convert(samples)
        return convert

    def _to_8_bits(self, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
        bits = int(self._source.tags(self._bands[0], ns="IMAGE_STRUCTURE").get("NBITS", dtype.itemsize * 8))
        if dtype == np.uint8 and bits == 8:
            return lambda samples: samples
        if dtype == np.uint8:
            return lambda samples: np.rint(samples * (255 / (2**bits - 1))).astype(np.uint8)
        if dtype == np.uint16:
            return lambda samples: (samples >> max(bits - 8, 0)).astype(np.uint8)
        if dtype.kind not in "iuf":
            raise InputError(f"picture {self.name} holds samples of {dtype}; save it with 8 or 16 bits per channel")
        kind = "floats" if dtype.kind == "f" else f"{'signed ' if dtype.kind == 'i' else ''}{bits}-bit integers"
        return conversion_by_range(kind, *self._extremes(), self.name)

    def _extremes(self) -> tuple[float, float]:
        """The lowest and the highest sample, NaN if any sample is."""
        lowest, highest = np.inf, -np.inf
        for _, window in self._source.block_windows(self._bands[0]):
            samples = self._source.read(self._bands, window=window)
            lowest, highest = np.minimum(lowest, samples.min()), np.maximum(highest, samples.max())
        return lowest, highest


@contextmanager
def gdal(failure: str) -> Iterator[None]:
    """Calls of GDAL, with bounded memory for blocks. All calls belong inside: GDAL sets its bound at the first of them.

    Args:
        failure: how the InputError begins that GDAL's errors become.
    """
    try:
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
            yield
    except RasterioError as error:  # rasterio's own words may only point to those of GDAL
        raise InputError(f"{failure}: {first_line(error.__cause__ or error)}") from error


def open_raster(file: Path | BinaryIO, mode: str = "r", **options: Any) -> Any:
    """`rasterio.open` without the warning that an ordinary picture does not lie on the earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(file, mode, **options)


def _open(file: str | Path | BinaryIO, driver: str) -> rasterio.DatasetReader:
    if isinstance(file, (str, Path)):
        return open_raster(Path(file), driver=driver)  # as a Path, a name with "://" or "!" stays the name of a file
    with read_from_start(file) as stream:
        return open_raster(io.BytesIO(stream.read()), driver=driver)


def read_directory(stream: BinaryIO) -> Mapping[int, Any]:
    """The tags of a TIFF's first picture; GDAL does not tell all of them."""
    head = stream.read(8)
    if 43 in head[2:4]:  # BigTIFF
        head += stream.read(8)
    directory = TiffImagePlugin.ImageFileDirectory_v2(head)
    stream.seek(directory.next)
    directory.load(stream)
    return directory


def _orientation(stream: BinaryIO) -> int:
    """The orientation of a TIFF, 1 (upright) to 8; 1 if its tags make no sense."""
    try:
        value = read_directory(stream).get(_ORIENTATION, 1)
    except BAD_DIRECTORY:
        return 1
    return value if value in range(1, 9) else 1


def _tile_of_jpeg2000(stream: BinaryIO, name: object) -> tuple[int, int]:
    """Width and height of a tile by the codestream's SIZ marker (ISO/IEC 15444-1, A.5.1)."""
    head = stream.read(40) if _find_codestream(stream) else b""
    if len(head) < 40 or not head.startswith(_CODESTREAM):
        raise InputError(f"picture {name} is damaged: no JPEG 2000 codestream begins where it should")
    width, height, left, top, *tile = struct.unpack_from(">6I", head, 8)
    return min(tile[0], width - left), min(tile[1], height - top)


def _find_codestream(stream: BinaryIO) -> bool:
    """Move to the codestream, past the boxes before it (ISO/IEC 15444-1, I.4); False if there is none.

    Bytes inside of other boxes do not count: a forged marker among metadata would hide the true size.
    """
    end = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if stream.read(4) == _CODESTREAM:  # a bare codestream
        stream.seek(0)
        return True
    stream.seek(0)
    while len(head := stream.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        rest = size - 8
        if size == 1:  # the size follows, in 64 bits
            rest = int.from_bytes(stream.read(8), "big") - 16
        if kind.lower() == b"jp2c":  # in either case of letters, as GDAL does
            return True
        if not 0 <= rest <= end - stream.tell():  # a size of 0 is that of the last box
            return False
        stream.seek(rest, os.SEEK_CUR)
    return False


def _to_stored(turn: int, width: int, height: int) -> np.ndarray:
    """From points (x, y, 1) of the upright picture of this size to those of the stored picture, as a matrix (3, 3).

    It inverts `turned`.
    """
    stored = np.eye(3, dtype=int)
    if turn >= 5:
        stored = stored @ [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    if turn in (2, 3, 6, 7):
        stored = stored @ [[-1, 0, width], [0, 1, 0], [0, 0, 1]]
    if turn in (3, 4, 7, 8):
        stored = stored @ [[1, 0, 0], [0, -1, height], [0, 0, 1]]
    return stored

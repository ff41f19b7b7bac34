"""Writing pictures larger than memory: a tiled TIFF, which is fed with blocks of pixels and compressed as they come."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
from numpy.typing import DTypeLike
from rasterio.windows import Window

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.data.raster import BAD_DIRECTORY, Georeference, gdal, open_raster, read_directory

TILE = 256
"""Pixels of a side of the file's tiles."""
_QUALITY = 92
_TILE_OFFSETS, _TILE_BYTE_COUNTS = 324, 325
"""Tags of TIFF."""
_WITHOUT_COLOUR = (128, 128, 128)


class TiledTiff:
    """A tiled TIFF (a BigTIFF if it grows beyond 4 GB), whole or not there at all; a context manager.

    Blocks of pixels may come in any order, and each pixel once. A row of the file's tiles is compressed and forgotten
    as soon as it is complete, so memory holds only the rows of tiles that blocks have begun: for blocks that come row
    by row, as many rows of pixels as a block has.

    Args:
        path: the file; it ends in `.tif` or `.tiff`.
        width, height: the size in pixels.
        dtype: uint8, or uint16 for one channel.
        channels: 1, or 3 for RGB.
        palette: a colour (red, green, blue) in 0..255 for each value, from 0 on; for one channel of uint8. Values
            without a colour are grey.
        lossy: compress by JPEG, as pictures are; otherwise by Deflate, which keeps every value.
        georeference: where the pixels lie on the earth, as `Windows.georeference` says.

    Raises:
        InputError: the file cannot be written, or a description that no TIFF can have.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        *,
        dtype: DTypeLike = np.uint8,
        channels: int = 1,
        palette: Sequence[Sequence[int]] | None = None,
        lossy: bool = False,
        georeference: Georeference | None = None,
    ):
        self.path, self.width, self.height, self.channels = path, width, height, channels
        self.dtype, self.palette, self.lossy, self.georeference = np.dtype(dtype), palette, lossy, georeference
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # begun rows of tiles: their pixels, and which came
        self._done: set[int] = set()
        self._failure = f"{path} cannot be written"
        if self.dtype not in (np.uint8, np.uint16) or channels not in (1, 3):
            raise InputError(f"{channels} channels of {self.dtype} are not written; use 1 or 3 of uint8 or uint16")
        if lossy and self.dtype != np.uint8:
            raise InputError("JPEG compression is for uint8; leave lossy out")
        if palette is not None and (channels != 1 or lossy or self.dtype != np.uint8 or len(palette) > 256):
            raise InputError(
                f"a palette of {len(palette)} colours does not fit {channels} channels of {self.dtype}; it has at most "
                "256, for one channel of uint8 without JPEG compression"
            )

    def __enter__(self) -> "TiledTiff":
        with contextlib.ExitStack() as stack, gdal(self._failure):
            self._temporary = stack.enter_context(written_whole(self.path))
            stack.push(self._check_whole)
            self._file = stack.enter_context(self._created(self._temporary))
            if self.palette is not None:
                rest = [_WITHOUT_COLOUR] * (256 - len(self.palette))
                self._file.write_colormap(1, dict(enumerate([*map(tuple, self.palette), *rest])))
            self._stack = stack.pop_all()
        return self

    def write(self, left: int, top: int, pixels: np.ndarray) -> None:
        """Write a block.

        Args:
            left, top: the place of its first pixel.
            pixels: (h, w) or, for RGB, (h, w, 3), of the file's dtype.

        Raises:
            InputError: the block is of another kind or reaches beyond the picture, its pixels were written before, or
                the disk is full.
        """
        shape = pixels.shape[:2]
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        bottom, right = top + shape[0], left + shape[1]
        if pixels.shape[2:] != (self.channels,) or pixels.dtype != self.dtype:
            raise InputError(
                f"a block {pixels.shape} of {pixels.dtype} does not fit {self.path.name}, which has {self.channels} "
                f"channels of {self.dtype}"
            )
        if not (0 <= left <= right <= self.width and 0 <= top <= bottom <= self.height):
            raise InputError(
                f"the block ({left}, {top}, {right}, {bottom}) reaches beyond {self.path.name}, which is "
                f"{self.width}x{self.height}"
            )
        for row in range(top // TILE, -(-bottom // TILE)):
            first = row * TILE
            start, stop = max(top, first), min(bottom, first + TILE)
            self._fill(row, slice(start - first, stop - first), slice(left, right), pixels[start - top : stop - top])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with gdal(self._failure), self._stack:
            if len(self._done) < -(-self.height // TILE):
                raise InputError(f"{self.path.name} is not complete: pixels were not written")

    def _created(self, path: Path) -> rasterio.io.DatasetWriter:
        options = {"compress": "deflate"} if not self.lossy else {"compress": "jpeg", "jpeg_quality": _QUALITY}
        if self.channels == 3:
            options |= {"interleave": "pixel", "photometric": "ycbcr" if self.lossy else "rgb"}
        if self.georeference is not None:
            options |= {"crs": self.georeference.crs, "transform": self.georeference.transform}
        return open_raster(
            path,
            "w",
            driver="GTiff",
            width=self.width,
            height=self.height,
            count=self.channels,
            dtype=self.dtype,
            tiled=True,
            blockxsize=TILE,
            blockysize=TILE,
            bigtiff="if_safer",
            **options,
        )

    def _fill(self, row: int, lines: slice, columns: slice, pixels: np.ndarray) -> None:
        """Put pixels into a row of tiles, and write the row once it is complete."""
        if row not in self._rows and row not in self._done:
            shape = (min(TILE, self.height - row * TILE), self.width)
            self._rows[row] = np.zeros((*shape, self.channels), self.dtype), np.zeros(shape, bool)
        if row in self._done or self._rows[row][1][lines, columns].any():
            raise InputError(f"pixels of {self.path.name} are written twice, in rows from {row * TILE} on")
        values, written = self._rows[row]
        values[lines, columns], written[lines, columns] = pixels, True
        if written.all():
            place = Window(0, row * TILE, self.width, len(values))
            with gdal(self._failure):
                self._file.write(np.moveaxis(values, -1, 0), window=place)
            del self._rows[row]
            self._done.add(row)

    def _check_whole(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Make sure that the closed file has every tile: GDAL does not report what fails while it closes a file."""
        if kind is not None:
            return
        with self._temporary.open("rb") as stream:
            try:
                tags = read_directory(stream)
                starts, sizes = (np.array(tags[tag], np.int64) for tag in (_TILE_OFFSETS, _TILE_BYTE_COUNTS))
                whole = bool(sizes.all()) and (starts + sizes).max() <= self._temporary.stat().st_size
            except BAD_DIRECTORY:
                whole = False
        if not whole:
            raise InputError(f"{self._failure}: its last bytes are missing; is the disk full?")

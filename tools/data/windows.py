"""Pictures by windows: what is larger than memory is read in parts, everything else is held whole.

TIFF (tiled or striped, BigTIFF, compressed, COG) and JPEG 2000 are read by windows through rasterio, the extra `huge`.
Other formats cannot be decoded in parts, and Pillow reads them whole. Either way, a window holds the pixels that
`read_picture` gives for the whole picture.
"""

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from terrazzo._pictures import read_head, read_picture, refusal
from terrazzo.errors import InputError, install_command

if TYPE_CHECKING:
    from terrazzo.tools.data.raster import Georeference

_DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
"""GDAL's name for the format of a file that begins with these bytes."""


class Windows:
    """An open picture that is read by windows; a context manager, which closes it. Threads must not share it.

    Attributes:
        name: what messages call the picture.
        width, height: the size in pixels, after the picture is turned upright.
        georeference: where the pixels lie on the earth; None if the file does not say.
    """

    georeference: "Georeference | None" = None

    def __init__(self, name: object, width: int, height: int):
        self.name, self.width, self.height = name, width, height

    def read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """The pixels from (left, top) up to and without (right, bottom), upright, in RGB with 8 bits per channel.

        Raises:
            InputError: the window is empty or reaches beyond the picture, or this part of the file is damaged.
        """
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise InputError(
                f"the window ({left}, {top}, {right}, {bottom}) is not inside the picture {self.name}, which is "
                f"{self.width}x{self.height}; give left < right and top < bottom within it"
            )
        return self._read(left, top, right, bottom)

    def _read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        raise NotImplementedError

    def close(self) -> None:
        """Close the file; a second call does nothing."""

    def __enter__(self) -> "Windows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WholePicture(Windows):
    """A picture in memory, under the interface of windows."""

    def __init__(self, name: object, image: Image.Image):
        super().__init__(name, *image.size)
        # Pillow's `crop` refuses windows of more pixels than its limit for files.
        self._pixels = np.asarray(image)

    def _read(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        return Image.fromarray(self._pixels[top:bottom, left:right])


def open_windows(file: str | Path | BinaryIO, name: object = None) -> Windows:
    """Open a picture to be read by windows.

    Args:
        file: a path, or a file open for reading bytes.
        name: what messages call the picture; None for the path.

    Raises:
        InputError: the picture cannot be read. TIFF and JPEG 2000 may have any size, but no tile or strip of more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels; other pictures may not have more pixels than that.
    """
    name = name or file
    try:
        head = read_head(file, 8)
    except OSError as error:
        raise refusal(file, name, error) from error
    driver = next((driver for start, driver in _DRIVERS.items() if head.startswith(start)), None)
    if driver is None:
        return WholePicture(name, read_picture(file, name))
    if importlib.util.find_spec("rasterio") is not None:
        from terrazzo.tools.data.raster import RasterWindows

        return RasterWindows(file, driver, name)
    try:
        return WholePicture(name, read_picture(file, name))
    except InputError as error:
        raise InputError(f"{error}; or install what reads such files by windows: {install_command('huge')}") from error

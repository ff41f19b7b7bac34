"""Videos, streams and cameras, read and written with OpenCV."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

from terrazzo.errors import InputError

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""The lower-case suffixes of videos, for searching a folder."""

_DEFAULT_RATE = 25.0
_PATIENCE_MS = 10_000


class Frame(NamedTuple):
    """A picture of a clip, its number from 0, and its time in seconds after the first frame."""

    image: Image.Image
    number: int
    seconds: float


@dataclasses.dataclass
class Clip:
    """A video, stream or camera that is known to give pictures.

    Attributes:
        place: a file, the address of a stream, or the number of a camera.
        name: what its results are called.
        rate: frames per second.
        count: how many frames the file says that it has; None for streams, cameras and files that do not say.
    """

    place: str | int
    name: str
    rate: float = _DEFAULT_RATE
    count: int | None = None
    _opened: "_Reader | None" = dataclasses.field(default=None, repr=False)

    @property
    def live(self) -> bool:
        """Whether it has no end of its own."""
        return self._opened is not None or isinstance(self.place, int)

    def frames(self) -> Iterator[Frame]:
        """The frames until the end, the first included. A stream can be read only once."""
        reader = self._opened or _Reader(self.place)
        with contextlib.closing(reader):
            for number, pixels in enumerate(reader):
                seconds = time.monotonic() - reader.start if self.live else number / self.rate
                yield Frame(Image.fromarray(np.ascontiguousarray(pixels[..., ::-1])), number, seconds)


def open_clip(place: str | int, name: str, live: bool) -> Clip:
    """The clip at a place, after its first frame was read. A live clip stays open.

    Raises:
        InputError: it cannot be opened, or has no frame.
        ModuleNotFoundError: OpenCV is not installed.
    """
    reader = _Reader(place)
    clip = Clip(place, name, reader.rate, None if live else reader.count)
    if live:
        clip._opened = reader
    else:
        reader.close()
    return clip


def is_video(path: str | Path) -> bool:
    """Whether a path ends as videos do; see `SUFFIXES`."""
    return Path(path).suffix.lower() in SUFFIXES


class _Reader:
    """An open clip; iterating gives frames, (H, W, 3) uint8 with blue first."""

    def __init__(self, place: str | int):
        cv2 = _opencv()
        if isinstance(place, int):
            self.capture = cv2.VideoCapture(place)
        else:
            patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE_MS]
            self.capture = cv2.VideoCapture(place, cv2.CAP_FFMPEG, patience)
        whole, self.first = self.capture.read() if self.capture.isOpened() else (False, None)
        if not whole:
            self.capture.release()
            raise InputError(_refusal(place))
        rate, count = self.capture.get(cv2.CAP_PROP_FPS), self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if 0 < rate <= 1000 else _DEFAULT_RATE
        self.count = int(count) if 0 < count < 2**31 else None
        self.start = time.monotonic()

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.first
        while True:
            whole, pixels = self.capture.read()
            if not whole:
                return
            yield pixels

    def close(self) -> None:
        """Close the file or the connection."""
        self.capture.release()


class ClipWriter:
    """Writes a video; all frames get the first frame's size, in even numbers.

    Args:
        path: the file; .mkv is lossless (FFV1 in RGB), and any other suffix is MPEG-4 Part 2, for drawings.
        rate: frames per second.
        background: the colour of a frame's area that a smaller picture leaves free; None to repeat the picture's last
            row and column there.
    """

    def __init__(self, path: Path, rate: float, background: tuple[int, int, int] | None):
        self.path, self.rate, self.background, self.writer = path, rate, background, None

    def add(self, image: Image.Image, height: int = 0) -> None:
        """Append a picture; the first picture, or `height` if it is larger, fixes the size; others are cut to it."""
        if self.writer is None:
            cv2 = _opencv()
            self.size = tuple(side + side % 2 for side in (image.width, max(image.height, height)))
            codec = cv2.VideoWriter_fourcc(*("FFV1" if self.path.suffix == ".mkv" else "mp4v"))
            self.writer = cv2.VideoWriter(str(self.path), codec, self.rate, self.size)
            if not self.writer.isOpened():
                raise InputError(f"OpenCV cannot write the video {self.path} of {self.size[0]}x{self.size[1]} pixels")
        self.writer.write(np.ascontiguousarray(self._filled(image)[..., ::-1]))

    def _filled(self, image: Image.Image) -> np.ndarray:
        """The picture at the video's size, (H, W, 3)."""
        width, height = self.size
        if self.background is None:
            pixels = np.asarray(image)[:height, :width]
            free = ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0))
            return np.pad(pixels, free, mode="edge")
        sheet = Image.new("RGB", self.size, self.background)
        sheet.paste(image, (0, 0))
        return np.asarray(sheet)

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.release()


def _opencv() -> ModuleType:
    """OpenCV, without its own messages on standard error."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet; OpenCV reads it at the first video
    os.environ.setdefault("OPENCV_VIDEOIO_DEBUG", "0")
    import cv2

    with contextlib.suppress(AttributeError):  # some builds lack it
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _refusal(place: str | int) -> str:
    if isinstance(place, int):
        return f"camera {place} cannot be opened or gives no picture; name another number, such as 0"
    if "://" in place:
        return f"{place} cannot be reached, or gives neither a picture nor a video that can be read"
    return f"video {place} is damaged, empty or in no format that can be read"

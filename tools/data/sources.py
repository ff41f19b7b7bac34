"""What a user may name to `terrazzo infer`: pictures, videos, folders, addresses and cameras.

Everything is opened before anything is computed, so that a bad name stops the command early.
"""

import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from terrazzo._pictures import SUFFIXES, is_hidden, is_picture
from terrazzo.errors import InputError
from terrazzo.tools.data import clips
from terrazzo.tools.data.clips import Clip, open_clip
from terrazzo.tools.data.pictures import FetchedPicture, Picture, unique_names

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SCHEMES = ("http", "https", "rtsp", "rtmp", "tcp", "udp")
_PATIENCE_S = 10
_LARGEST = 200 * 2**20
"""Bytes of a fetched picture, at most."""


def find_sources(
    places: Sequence[str | Path], apart: Path | None = None, by_windows: bool = False
) -> list[Picture | Clip]:
    """Open everything that a user names.

    Args:
        places: files of pictures and videos; folders, whose subfolders are searched, too; addresses of pictures and
            streams (http, https, rtsp, ...); numbers of cameras.
        apart: a folder to leave out of the search: the folder of the results.
        by_windows: whether pictures will be read by windows, so that they may be larger than memory.

    Raises:
        InputError: a place does not exist, holds nothing that can be read, or cannot be read.
        ModuleNotFoundError: a video is named, and OpenCV is not installed.
    """
    found: list[tuple[str | int | Path, str]] = []  # the place, and what its results may be called
    for place in places:
        text = str(place)
        if _ADDRESS.match(text):
            found.append((text, _name_of_address(text)))
        elif Path(place).is_dir():
            found += [(path, str(path.relative_to(place).with_suffix(""))) for path in _inside(Path(place), apart)]
        elif text.isdecimal() and not Path(place).exists():
            found.append((int(text), f"camera_{text}"))
        else:
            found.append((Path(place), Path(place).stem))
    names = unique_names([(name, getattr(place, "suffix", "")) for place, name in found])
    return [_opened(place, name, by_windows) for (place, _), name in zip(found, names)]


def _opened(place: str | int | Path, name: str, by_windows: bool) -> Picture | Clip:
    if isinstance(place, int):
        return open_clip(place, name, live=True)
    if isinstance(place, str):
        return _fetched(place, name, by_windows)
    if clips.is_video(place):
        if not place.is_file():
            raise InputError(f"video {place} does not exist")
        return open_clip(str(place), name, live=False)
    return _checked(Picture(place, name), by_windows)


def _inside(folder: Path, apart: Path | None) -> list[Path]:
    """The pictures and videos of a folder and its subfolders, without hidden folders and files."""
    apart = None if apart is None else apart.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        if is_hidden(path, folder) or not path.is_file():
            continue
        if apart is not None and folder.resolve() != apart and path.resolve().is_relative_to(apart):
            continue
        if is_picture(path) or clips.is_video(path):
            found.append(path)
    if not found:
        known = ", ".join([*SUFFIXES, *clips.SUFFIXES])
        raise InputError(f"folder {folder} has no pictures and no videos; the suffixes read are {known}")
    return found


def _checked(picture: Picture, by_windows: bool) -> Picture:
    """The picture, after a look whether it can be read."""
    if by_windows:
        picture.windows().close()
    else:
        picture.read()
    return picture


def _fetched(address: str, name: str, by_windows: bool) -> Picture | Clip:
    """A picture from a server, or a stream."""
    scheme = address.split("://")[0].lower()
    if scheme not in _SCHEMES:
        raise InputError(f"{address} begins with {scheme}://; use one of {', '.join(_SCHEMES)}")
    if scheme in ("http", "https"):
        data = _picture_of(address)
        if data is not None:
            return _checked(FetchedPicture(address, name, data), by_windows)
    return open_clip(address, name, live=True)


def _picture_of(address: str) -> bytes | None:
    """The bytes of a picture; None if the server says that it sends something else.

    Raises:
        InputError: the server does not answer, refuses, or sends text or too much.
    """
    path = urllib.parse.urlsplit(address).path
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "terrazzo"})
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            kind = answer.headers.get_content_type()
            if kind.startswith("text/"):
                raise InputError(f"{address} is {kind}, neither a picture nor a video; name the picture itself")
            if not (kind.startswith("image/") or (kind == "application/octet-stream" and is_picture(path))):
                return None
            data = answer.read(_LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise InputError(f"{address} cannot be fetched: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:  # no server, no answer in time, half an answer; a bad address
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{address} cannot be reached: {reason}") from error
    if len(data) > _LARGEST:
        raise InputError(f"{address} has more than {_LARGEST // 2**20} MiB; fetch it, and name the file")
    return data


def _name_of_address(address: str) -> str:
    """The stem of the last part of an address, or the server's name."""
    parts = urllib.parse.urlsplit(address)
    stem = Path(urllib.parse.unquote(parts.path)).stem
    return re.sub(r"[^\w.-]+", "_", stem or parts.netloc) or "stream"

"""Writing files so that nobody ever sees half a file."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial-"
"""The prefix of a file's name while it is being written."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing: a full disk, a quota, a limit of a file's size, a broken disk."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside this context, an error of writing names `path`; Python's own error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(path)
        raise


def check_room(path: Path) -> None:
    """Raise an OSError if a file cannot grow by a byte.

    Some writers end well on a full disk and leave half a file: OpenCV's videos, and Pillow's JPEGs if they are small.
    """
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(b"\0")
        file.flush()
        file.truncate(size)
        os.fsync(file.fileno())


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it becomes `path` if the block ends well and vanishes if not.

    The temporary name ends as `path` does, since many writers choose the format by it. If the disk is full, an OSError
    names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL, suffix=f".{path.name}")
    os.close(handle)
    temporary = Path(name)
    try:
        with named(path):
            yield temporary
            check_room(temporary)  # and on disk before it is renamed: a power cut leaves the old file or the new one
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a temporary file is private; the result is an ordinary file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove the partial files that a killed process left in a folder."""
    for path in folder.glob(f"{_PARTIAL}*"):
        path.unlink(missing_ok=True)

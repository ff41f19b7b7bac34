"""Writing results so that nobody ever sees half a file, and saying early that a place cannot be written to."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from terrazzo.errors import InputError


def check_folder(path: Path) -> Path:
    """Return `path` if it is a folder or could be made one; InputError if a file is in the way. Creates nothing."""
    for ancestor in (path, *path.parents):
        if ancestor.is_dir():
            return path
        if ancestor.exists() or ancestor.is_symlink():
            raise InputError(f"{path} cannot be a folder: {ancestor} is a file; name another place")
    return path


def check_output_file(path: Path) -> Path:
    """Return `path` if a file could be written there; InputError if it is a folder or lies below a file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    check_folder(path.parent)
    return path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it becomes `path` if the block ends well and vanishes if not.

    The temporary name ends as `path` does, since many writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".{path.name}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Checks, before any work, that a path can be written; folders that are written whole."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from terrazzo._files import named
from terrazzo.errors import InputError

PLOTS = (".png", ".svg", ".pdf")


def check_folder(path: Path) -> Path:
    """Return `path` if it is a writable folder or could be created; InputError if not. It creates nothing."""
    for ancestor in (path, *path.parents):
        if ancestor.is_dir():
            if not os.access(ancestor, os.W_OK):
                raise InputError(f"{path} cannot be written: {ancestor} is read-only; name another place")
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


def check_plot(path: Path) -> Path:
    """Return `path` if matplotlib can write a plot there; InputError if not, or by its suffix."""
    if path.suffix.lower() not in PLOTS:
        raise InputError(f"{path.name} must end in {', '.join(PLOTS)}")
    return check_output_file(path)


def check_new_folder(path: Path) -> Path:
    """Return `path` if a whole folder can be put there: it does not exist, or is an empty folder; InputError if not."""
    if path.is_symlink():
        raise InputError(f"{path} is a link; name the folder itself, or another one")
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError(f"{path} is not empty; name a new folder")
        if path.samefile(Path.cwd()):
            raise InputError(f"{path} is the current folder, which cannot be replaced; name a new folder in it")
        if os.path.ismount(path):
            raise InputError(f"{path} is a mount point, which cannot be replaced; name a new folder in it")
    return check_folder(path)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it becomes `path` if the block ends well and vanishes if not.

    Raises:
        InputError: a file or a folder that is not empty is in the way, or the folder cannot be replaced. It comes
            before the block runs.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".partial-{path.name}-"))
    try:
        with named(path):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # a temporary folder is private; the result is an ordinary folder
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

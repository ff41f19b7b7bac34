"""Checks, before any work, that a path can be written."""

import os
from pathlib import Path

from terrazzo.errors import InputError


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

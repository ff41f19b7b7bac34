"""How CPU kernels are compiled, and where their code is kept."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numba


def jit(function: Callable) -> Callable:
    """Compile a kernel at its first call, without the interpreter's lock, and keep the code for later processes.

    The code is in the user's cache (or in NUMBA_CACHE_DIR), for one version of the sources. If no folder can be
    written, later processes compile again. A product and a sum may become one operation, which rounds once; their
    order stays.
    """
    return _compiled(function, {"contract"})


def jit_sum(function: Callable) -> Callable:
    """Like `jit`, for a function that adds up numbers: the compiler chooses the order, which no call changes."""
    return _compiled(function, {"contract", "reassoc"})


def _compiled(function: Callable, fastmath: set[str]) -> Callable:
    # Without numpy's error model each division would have a branch, and no loop with one would become vector code.
    options = dict(nogil=True, fastmath=fastmath, error_model="numpy")
    with _cache_folder():
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write
            return numba.njit(**options)(function)


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """Inside, numba takes a folder of terrazzo's for the compiled code of what it decorates."""
    before = numba.config.CACHE_DIR
    home = before or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "terrazzo")
    numba.config.CACHE_DIR = str(Path(home, "kernels", _digest()))
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    """A name for the sources of all CPU kernels. Numba looks at the file of a kernel only, and kernels share others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/fused_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

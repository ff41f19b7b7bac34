"""How CPU kernels are compiled, and where their code is kept."""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
from numba.core import event

_logger = logging.getLogger(__name__)


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
    _watch()
    with _cache_folder() as folder:
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write
            _say(f"no folder such as {folder} can be written, so each process compiles its CPU kernels")
            return numba.njit(**options)(function)
    _forgive_full_disks(kernel)
    return kernel


class _Compilations(event.Listener):
    """Says that kernels are compiled, because the first call takes seconds."""

    def on_start(self, event: event.Event) -> None:
        if event.data["dispatcher"].py_func.__module__.startswith("terrazzo."):
            _say("terrazzo compiles CPU kernels for this processor: some seconds, once for each version")

    def on_end(self, event: event.Event) -> None:
        pass


@functools.lru_cache(maxsize=1)
def _watch() -> None:
    event.register("numba:compile", _Compilations())


@functools.lru_cache(maxsize=4)
def _say(line: str) -> None:
    """Log a line once; Python prints it to standard error unless logging is configured."""
    _logger.warning(line)


def _forgive_full_disks(kernel: Callable) -> None:
    """Compiled code that cannot be kept, on a full disk, is compiled again by the next process."""
    save = kernel._cache.save_overload

    def attempt(*arguments) -> None:
        try:
            save(*arguments)
        except OSError as error:
            _say(f"compiled CPU kernels could not be kept, so each process compiles them: {error}")

    kernel._cache.save_overload = attempt


@contextlib.contextmanager
def _cache_folder() -> Iterator[str]:
    """Inside, numba takes a folder of terrazzo's for the compiled code of what it decorates."""
    before = numba.config.CACHE_DIR
    home = before or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "terrazzo")
    numba.config.CACHE_DIR = str(Path(home, "kernels", _digest()))
    try:
        yield numba.config.CACHE_DIR
    finally:
        numba.config.CACHE_DIR = before


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    """A name for the sources of all CPU kernels. Numba looks at the file of a kernel only, and kernels share others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/fused_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

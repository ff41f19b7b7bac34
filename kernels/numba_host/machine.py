"""What every CPU kernel asks of the machine before it imports numba: can it run here, and where is its compiled code."""

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def refusal(dtype: torch.dtype, misfit: str | None = None) -> str | None:
    """Why the CPU kernels of an operator cannot run, or None if they can.

    Args:
        misfit: why the operator's own kernels do not take the call's sizes; None if they do.
    """
    if not has_numba():
        return "needs the package numba, which is not installed; pip install 'terrazzo[cpu]'"
    if dtype not in _DTYPES:
        return f"computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    return misfit


def jit(function: Callable) -> Callable:
    """Compile a kernel at its first call, without the interpreter's lock, and keep the code for later processes.

    The code is in the user's cache, for one version of the sources. If no folder can be written, later processes compile
    again. Products and sums may become one operation (which rounds once); their order stays.
    """
    import numba

    options = dict(nogil=True, fastmath={"contract"})
    with _cache_folder():
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write
            return numba.njit(**options)(function)


@contextlib.contextmanager
def _cache_folder():
    """Inside, numba takes a folder of terrazzo's for the compiled code of what it decorates."""
    import numba

    before = numba.config.CACHE_DIR
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    numba.config.CACHE_DIR = before or str(Path(home, "terrazzo", "kernels", _digest()))
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    """A name for the sources of all CPU kernels: numba looks at one file only, and kernels share others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/fused_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

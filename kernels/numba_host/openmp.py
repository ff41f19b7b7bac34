"""PyTorch's own threads. After an operation they spin for a while, so other threads would wait for a processor."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(work: Callable[[], None], threads: int) -> bool:
    """Call `work()` on PyTorch's OpenMP threads, this thread among them; False if they cannot be reached.

    The threads are GNU's OpenMP, which PyTorch's packages for Linux contain. A forked process has none of its parent's
    threads, and its OpenMP does not know. `work` must not raise.
    """
    parallel = _parallel(os.getpid())
    if parallel is None:
        return False
    parallel(_CALLBACK(lambda _: work()), None, threads, 0)
    return True


@functools.lru_cache(maxsize=1)
def _parallel(process: int) -> Callable | None:
    """`GOMP_parallel` of the library that PyTorch has loaded, in a process that has not been forked from another."""
    if not sys.platform.startswith("linux") or process != _FIRST:
        return None
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line}
    # Other packages bring an OpenMP of their own, scikit-learn for example, whose threads are not PyTorch's.
    home = os.path.realpath(os.path.dirname(torch.__file__))
    paths = {path for path in paths if path.startswith((f"{home}/", f"{home}.libs/"))} or paths
    if len(paths) != 1:
        return None
    try:
        function = ctypes.CDLL(paths.pop()).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_FIRST = os.getpid()

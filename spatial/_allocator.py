"""The memory that the C library keeps for itself."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in <malloc.h> of glibc
_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD
_SMALL, _LARGE = 1 << 20, 1 << 25  # bytes; the second is the largest value of glibc's dynamic threshold
_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def returned_at_once(device: torch.device) -> Iterator[None]:
    """Tensors above 1 MiB go back to the system when they are freed, on a CPU with glibc.

    Otherwise glibc keeps up to 64 MiB for each thread, so for each virtual rank. That is as much as parts save.

    This is a setting of the process. Afterwards the threshold is glibc's largest, and glibc no longer adjusts it. Where
    the environment sets the threshold, it stays.
    """
    global _users
    set_option = _mallopt() if device.type == "cpu" else None
    if set_option is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            set_option(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                set_option(_MMAP_THRESHOLD, _LARGE)
                set_option(_TRIM_THRESHOLD, 2 * _LARGE)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function that sets an option; None if the environment sets the threshold."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in tunables:
        return None
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no such function
        return ctypes.CDLL(None).mallopt
    return None

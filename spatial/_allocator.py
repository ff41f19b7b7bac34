"""The memory that the C library keeps for itself."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in <malloc.h> of glibc
_SMALL, _LARGE = 1 << 20, 1 << 25  # bytes; glibc raises its own threshold to the second in any program with large maps


@contextlib.contextmanager
def returned_at_once(device: torch.device) -> Iterator[None]:
    """Tensors above 1 MiB go back to the system when they are freed, on a CPU with glibc.

    Otherwise glibc keeps up to 64 MiB for each thread, so for each virtual rank. That is as much as parts save.
    """
    set_option = None
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no such function
            set_option = ctypes.CDLL(None).mallopt
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LARGE)

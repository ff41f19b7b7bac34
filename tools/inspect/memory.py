"""The peak memory of a part of a program."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The memory that the block inside takes at its peak, above what is in use before.

    On a GPU that is what PyTorch allocates; on a CPU what the process has in memory, kernels' own memory included, in
    steps of a few hundred kB.

    Attributes:
        bytes: set when the block ends; None where the system does not say (only Linux does, for CPUs).
    """

    bytes: float | None = None

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would serve the block unseen
        self.before = None
        with contextlib.suppress(OSError, StopIteration):
            _RESET.write_text("5")  # the peak becomes what is in use now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = float(torch.cuda.max_memory_allocated(self.device) - self.before)
        elif self.before is not None:
            self.bytes = float(max(0, _status("VmHWM") - self.before))


def _status(key: str) -> int:
    """A figure of this process in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

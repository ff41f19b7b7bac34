"""What a fused form asks the machine before it imports triton: whether it can run, and how products are rounded."""

import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Limit:
    """The range of sizes that an operator's kernels can take, both ends included, and the refusal of other sizes."""

    least: int
    most: int
    words: str

    def misfit(self, *sizes: int) -> str | None:
        """None if all sizes fit, else the refusal. Sizes may be symbolic."""
        for size in sizes:
            if size < self.least or size > self.most:
                return self.words
        return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1): on any device, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def interpreted(kernel) -> bool:
    """Whether a kernel was defined while `interpreting`: Triton decides this once, when it is imported."""
    return not hasattr(kernel, "cache_key")


def is_amd() -> bool:
    return torch.version.hip is not None


@functools.lru_cache(maxsize=1)
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def device_refusal(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA device, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and this machine has none"
    if not is_amd() and torch.cuda.get_device_capability(device) < _CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs CUDA compute capability 8.0, {device} has {major}.{minor}"
    return None


def refusal(device: torch.device, dtype: torch.dtype, misfit: str | None = None) -> str | None:
    """Why the fused form of an operator cannot run on tensors of this device and dtype, or None if it can.

    Args:
        misfit: why the operator's own kernels do not take the call's sizes; None if they do.
    """
    if device.type != "cuda" and not interpreting():
        return f"needs a CUDA device, the tensors are on {device.type}"
    if not has_triton():
        return "needs the package triton, which is not installed"
    if dtype not in _DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if misfit is not None:
        return misfit
    return device_refusal(device) if device.type == "cuda" and not interpreting() else None


def refusals(
    device: torch.device, dtype: torch.dtype, misfit: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Why backends cannot run on these tensors, and why "auto" skips a backend that can; see `backend.consider`."""
    reason = refusal(device, dtype, misfit)
    discouraged = {}
    if interpreting():
        discouraged["fused"] = "TRITON_INTERPRET is set, which makes it slow: it runs only when asked for by name"
    return {} if reason is None else {"fused": reason}, discouraged


def precision(dtype: torch.dtype) -> str:
    """Triton's input precision: float32 products are IEEE unless the user allowed TF32 for matrix products."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def block_of(size: int) -> int:
    """The power of two that holds `size`, at least 16, the smallest block of a matrix unit."""
    return max(16, 1 << (size - 1).bit_length())


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """The context of a launch: kernels run on the current device, which may differ from the device of their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""The precision in which operators compute, whether autocast is on or off."""

import contextlib
from collections.abc import Iterator

import torch


def accumulator(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of sums, weights and states: float64 where a tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Turn autocast off inside the `with` block, on the device of `x`: operations keep the dtypes of their tensors."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Matrix products of float32 are float32 inside the `with` block, on GPUs too, even if the user allowed TF32."""
    matmul = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)

"""The precision in which operators compute, whether autocast is on or off."""

import contextlib

import torch


def accumulator(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of sums, weights and states: float64 where a tensor is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Turn autocast off inside the `with` block, on the device of `x`: operations keep the dtypes of their tensors."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()

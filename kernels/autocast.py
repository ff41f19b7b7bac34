"""Out of autocast, where its rounding would show."""

import contextlib

import torch


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Operations inside keep the dtypes of what they are given; `x` says on which device."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()

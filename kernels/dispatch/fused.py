"""The fused form is a matter of the device: Triton's kernels on a GPU, Numba's on a CPU."""

import torch

from terrazzo.kernels.numba_host import machine as numba_machine
from terrazzo.kernels.triton_host import machine as triton_machine


def is_for_cpu(device: torch.device) -> bool:
    """Whether the fused form of a device is Numba's. Triton's interpreter takes the place of both, for tests."""
    return device.type == "cpu" and not triton_machine.interpreting()


def refusals(
    device: torch.device, dtype: torch.dtype, misfit: str | None, slow: str | None, cpu: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Why backends cannot run a call, and why "auto" skips a backend that can; see `backend.consider`.

    Args: see `Needs` and `Operator` in `terrazzo.kernels.dispatch.operator`.
    """
    if not (cpu and is_for_cpu(device)):
        return triton_machine.refusals(device, dtype, misfit)
    reason = numba_machine.refusal(dtype)
    return {} if reason is None else {"fused": reason}, {} if slow is None else {"fused": slow}

"""The fused form is a matter of the device: Triton's kernels on a GPU, Numba's on a CPU."""

from types import ModuleType
from typing import NamedTuple

import torch

from terrazzo.kernels.numba_host import machine as numba_machine
from terrazzo.kernels.triton_host import machine as triton_machine


def is_for_cpu(device: torch.device) -> bool:
    """Whether the fused form of a device is Numba's. Triton's interpreter takes the place of both, for tests."""
    return device.type == "cpu" and not triton_machine.interpreting()


class Forms(NamedTuple):
    """The modules of an operator that run inside of its opaque ops; all have the same functions.

    Attributes:
        gpu: the fused form in Triton.
        cpu: the fused form in Numba.
        portable: None for an operator whose portable form needs no opaque op.
    """

    gpu: ModuleType
    cpu: ModuleType
    portable: ModuleType | None = None

    def of(self, device: torch.device, backend: str = "fused") -> ModuleType:
        """The module that computes a call for which `backend` was chosen."""
        if backend != "fused":
            return self.portable
        return self.cpu if is_for_cpu(device) else self.gpu


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

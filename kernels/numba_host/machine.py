"""What every CPU kernel asks of the machine before it imports numba."""

import functools
import importlib.util

import torch

from terrazzo.errors import install_command

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def refusal(dtype: torch.dtype) -> str | None:
    """Why CPU kernels cannot run on tensors of this dtype, or None if they can."""
    if not has_numba():
        return f"needs the package numba, which is not installed; {install_command('cpu')}"
    if dtype not in _DTYPES:
        return f"computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    return None

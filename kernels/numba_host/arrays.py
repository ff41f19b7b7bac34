"""Tensors as kernels take them: NumPy arrays of the same memory."""

import numpy as np
import torch

_TYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.int64: "<i8"}


class _Memory:
    """The memory of a contiguous CPU tensor, as NumPy asks for it."""

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...]):
        self.tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": shape,
            "typestr": _TYPES[tensor.dtype],
            "version": 3,
        }


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """An array of the memory of a contiguous CPU tensor, which it keeps alive.

    `Tensor.numpy` would also make the tensor's storage one that cannot be resized, as FSDP resizes parameters.
    """
    return np.asarray(_Memory(tensor, tuple(tensor.shape)))


def rows_of(tensor: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory of a CPU tensor whose last dimension is contiguous, and the steps between its other indices.

    Kernels for arrays of any strides would not be vector code. A dimension of size 1 has step 0, so that any index
    reads its only element.
    """
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    *sizes, last = tensor.shape
    steps = tuple([0 if size == 1 else step for size, step in zip(sizes, tensor.stride())])
    span = 0 if tensor.numel() == 0 else last + sum([(size - 1) * step for size, step in zip(sizes, steps)])
    return np.asarray(_Memory(tensor, (span,))), steps

"""Tensors as kernels take them: NumPy arrays of the same memory."""

import numpy as np
import torch

_TYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.int64: "<i8"}


class _Memory:
    """The memory of a contiguous CPU tensor, as NumPy asks for it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": _TYPES[tensor.dtype],
            "version": 3,
        }


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """An array of the memory of a contiguous CPU tensor, which it keeps alive.

    `Tensor.numpy` would also make the tensor's storage one that cannot be resized, as FSDP resizes parameters.
    """
    return np.asarray(_Memory(tensor))

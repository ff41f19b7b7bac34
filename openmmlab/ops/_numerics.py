"""Shared by several operators: the precision in which they compute, and gradients of a recomputed forward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def computable(tensor: Tensor) -> Tensor:
    """The tensor in single precision at least, which every operator computes on every device."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def at_least_single(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one precision: float64 if any of them has it, else float32.

    Sums over many terms lose too much in 16 bits, and not every CPU operator takes 16-bit types.
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function(*inputs)` by each of its inputs: the function is computed again and differentiated."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*inputs)
        return torch.autograd.grad(
            output, inputs, grad_output.to(output.dtype), allow_unused=True, materialize_grads=True
        )

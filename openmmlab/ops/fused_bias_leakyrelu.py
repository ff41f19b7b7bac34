"""Bias, leaky ReLU and scale in one (Karras et al., 2020, the layers of StyleGAN2)."""

import torch
from torch import Tensor

from terrazzo.errors import InputError

LEAKY_RELU = 3


def fused_bias_leakyrelu(
    input: Tensor, bias: Tensor, reference: Tensor, act: int, grad: int, alpha: float, scale: float
) -> Tensor:
    """The activation of input + bias, or the derivative in the direction of input + bias.

    Args:
        input: B C and any further axes.
        bias: C, or empty.
        reference: as `input`; the activation's result, read for the derivative.
        act: 3, the leaky ReLU; mmcv asks for no other.
        grad: 0 for the activation, 1 for its derivative.
        alpha: the slope below 0.
        scale: a factor on the result.

    Raises:
        InputError: for another `act` or `grad`.
    """
    if act != LEAKY_RELU or grad not in (0, 1):
        raise InputError(f"fused_bias_leakyrelu knows act=3 with grad=0 or 1, not act={act} with grad={grad}")
    if bias.numel():
        input = input + bias.view(-1, *(1,) * (input.dim() - 2))
    positive = (reference if grad else input) > 0
    return torch.where(positive, input, input * alpha) * scale

"""Bias, activation, gain and clamp in one, with two derivatives (Karras et al., 2021, the layers of StyleGAN3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single

# In the order of mmcv's numbers, from 1. The first three are piecewise linear; alpha is the third's slope below 0.
ACTIVATIONS = (
    lambda x, alpha: x,
    lambda x, alpha: F.relu(x),
    F.leaky_relu,
    lambda x, alpha: x.tanh(),
    lambda x, alpha: x.sigmoid(),
    lambda x, alpha: F.elu(x),
    lambda x, alpha: F.selu(x),
    lambda x, alpha: F.softplus(x),
    lambda x, alpha: F.silu(x),
)
LINEAR, RELU, LEAKY_RELU = 1, 2, 3


def bias_act(
    x: Tensor,
    b: Tensor,
    xref: Tensor,
    yref: Tensor,
    dy: Tensor,
    grad: int,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """The activation of x + b, or x times its first derivative, or x dy times its second.

    Args:
        x: the input, of any shape; for a derivative the direction in which it is taken.
        b: one per element of axis `dim`, or empty.
        xref: for a derivative, the input of the activation if it is not piecewise linear.
        yref: for a derivative, the result of the activation if it is piecewise linear.
        dy: for the second derivative, the direction in which the first was taken.
        grad: 0, 1 or 2, the derivative.
        dim: axis of the bias.
        act: 1 to 9, the place in `ACTIVATIONS`.
        alpha: slope of the leaky ReLU below 0.
        gain: a factor on the activation.
        clamp: the largest size of the result; negative for no limit.
    """
    single, bias, input, result, direction = at_least_single(x, b, xref, yref, dy)
    shape = [-1 if axis == dim else 1 for axis in range(x.dim())]

    def activate(value: Tensor) -> Tensor:
        value = ACTIVATIONS[act - 1](value + bias.view(shape) if bias.numel() else value, alpha) * gain
        return value.clamp(-clamp, clamp) if clamp >= 0 else value

    if grad == 0:
        return activate(single).to(x.dtype)
    if act <= LEAKY_RELU:
        # mmcv passes the result in place of the input, and for act=1 neither: there nothing counts as clamped.
        result = result if result.numel() else torch.zeros_like(single)
        slope = torch.where(result > 0, single, single * {LINEAR: 1, RELU: 0, LEAKY_RELU: alpha}[act]) * gain
        return (slope * (result.abs() < clamp) if clamp >= 0 else slope).to(x.dtype)
    with torch.enable_grad():
        input = input.detach().requires_grad_()
        (first,) = torch.autograd.grad(activate(input).sum(), input, create_graph=grad == 2)
        if grad == 1:
            return (single * first).to(x.dtype)
        (second,) = torch.autograd.grad(first.sum(), input)
    return (single * direction * second).to(x.dtype)

"""Parameters, multiply-adds and activations of a model, counted without computing anything.

The count runs on the meta device: shapes flow, numbers do not, so a model of a billion parameters takes as long as its
Python code takes. Conventions (those of fvcore and of the papers' tables):

- a MAC is one multiply-add, half of what `torch.utils.flop_counter` calls FLOPs; only operations that have a FLOP
  formula there count (convolution, matrix product, attention, and any operator that registers a formula of its own);
- activations are the output elements of exactly those operations. `scaled_dot_product_attention` is its two matrix
  products, so its attention weights count; an operator that is one opaque kernel counts its output only.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from terrazzo.errors import InputError


@dataclass(frozen=True)
class Measured:
    """What one forward pass of one image costs.

    Attributes:
        params: number of parameters.
        macs: multiply-adds.
        activations: output elements of convolutions, matrix products and attention.
    """

    params: int
    macs: int
    activations: int


class _CountActivations(TorchDispatchMode):
    """Adds up the output elements of every operation that has a FLOP formula."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            first = out[0] if isinstance(out, (tuple, list)) else out
            self.total += first.numel()
        return out


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that `size` means: a single number is a square. InputError if it is not positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"the image size is {size}; it must be one or two numbers of at least 1, height first")
    return pair


def meta_outputs(model: nn.Module, size: int | tuple[int, int], in_chans: int = 3):
    """The outputs of `model` for one image, as meta tensors: right shapes, no numbers.

    The model itself is not touched, on whichever device its parameters lie; its mode is what the caller left it in.

    Args:
        model: takes one tensor (1, in_chans, H, W).
        size: H and W, or one number for a square.
        in_chans: channels of the image.
    """
    height, width = image_size(size)
    state = {name: t.to("meta") for named in (model.named_parameters(), model.named_buffers()) for name, t in named}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    image = torch.empty(1, in_chans, height, width, dtype=dtype, device="meta")
    with torch.no_grad():
        return torch.func.functional_call(model, state, (image,))


def measure(model: nn.Module, size: int | tuple[int, int], in_chans: int = 3) -> Measured:
    """Count the cost of one forward pass of one image, in evaluation mode.

    Args:
        model: takes one tensor (1, in_chans, H, W); on any device, the meta device included.
        size: H and W, or one number for a square.
        in_chans: channels of the image.

    Raises:
        InputError: the size is not positive.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with FlopCounterMode(display=False) as flops, _CountActivations() as activations:
            meta_outputs(model, size, in_chans)
    finally:
        for module, training in modes:
            module.training = training
    return Measured(
        params=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2,
        activations=activations.total,
    )

"""Parameters, multiply-adds and activations of a model, counted without computing anything.

The count runs on the meta device: shapes flow, numbers do not, so a model of a billion parameters takes only the time
of its Python code. Conventions (as in fvcore and in the papers' tables):

- a MAC is one multiply-add, half of what `torch.utils.flop_counter` calls FLOPs; only operations that have a FLOP
  formula there count (convolution, matrix product, attention, and any operator that registers a formula);
- activations are the output elements of exactly those operations. `scaled_dot_product_attention` is its two matrix
  products, so its attention weights count; an operator that is one opaque kernel counts its output only.
"""

from dataclasses import dataclass

from torch import nn

from terrazzo.tools.inspect.trace import trace


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


def measure(model: nn.Module, size: int | tuple[int, int], in_chans: int = 3) -> Measured:
    """Count the cost of one forward pass of one image, in evaluation mode.

    Args:
        model: takes one tensor (1, in_chans, H, W); on any device, the meta device included.
        size: H and W, or one number for a square.
        in_chans: channels of the image.

    Raises:
        InputError: there can be no image of that size.
    """
    operations = trace(model, size, in_chans)
    return Measured(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(operation.flops for operation in operations) // 2,
        activations=sum(operation.activations for operation in operations),
    )

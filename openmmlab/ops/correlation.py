"""Correlation of two feature maps (Dosovitskiy et al., 2015, equation 1): dot products of windows moved apart."""

from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single, gradients


def correlation_forward(
    input1: Tensor,
    input2: Tensor,
    output: Tensor,
    kH: int,
    kW: int,
    patchH: int,
    patchW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    dilation_patchH: int,
    dilation_patchW: int,
    dH: int,
    dW: int,
) -> None:
    """Fills `output` with the correlations.

    Args:
        input1: B C H W.
        input2: as `input1`.
        output: B, patchH, patchW, output rows, output columns, filled in place.
        kH: rows of a window.
        kW: columns of a window.
        patchH: displacements of the second map down, the middle one 0.
        patchW: displacements across.
        padH: zeros added at the top and at the bottom.
        padW: zeros added at the left and at the right.
        dilationH: distance of a window's rows.
        dilationW: distance of its columns.
        dilation_patchH: step of the displacements down.
        dilation_patchW: step across.
        dH: stride down.
        dW: stride across.
    """
    down = (kH, patchH, padH, dilationH, dilation_patchH, dH)
    across = (kW, patchW, padW, dilationW, dilation_patchW, dW)
    output.copy_(_correlate(*at_least_single(input1, input2), down, across))


def correlation_backward(
    grad_output: Tensor,
    input1: Tensor,
    input2: Tensor,
    grad_input1: Tensor,
    grad_input2: Tensor,
    kH: int,
    kW: int,
    patchH: int,
    patchW: int,
    padH: int,
    padW: int,
    dilationH: int,
    dilationW: int,
    dilation_patchH: int,
    dilation_patchW: int,
    dH: int,
    dW: int,
) -> None:
    """Fills the gradients by both maps; arguments as in the forward."""
    down = (kH, patchH, padH, dilationH, dilation_patchH, dH)
    across = (kW, patchW, padW, dilationW, dilation_patchW, dW)
    gradient, *maps = at_least_single(grad_output, input1, input2)
    found = gradients(partial(_correlate, down=down, across=across), maps, gradient)
    for target, source in zip((grad_input1, grad_input2), found):
        target.copy_(source)


def _correlate(first: Tensor, second: Tensor, down: tuple[int, ...], across: tuple[int, ...]) -> Tensor:
    """The correlations; each axis as (window, displacements, padding, dilation, step of displacements, stride)."""
    pad_h, pad_w = down[2], across[2]
    reach_h, reach_w = (axis[4] * (axis[1] - 1) // 2 for axis in (down, across))
    first = F.pad(first, (pad_w, pad_w, pad_h, pad_h))
    second = F.pad(second, (pad_w + reach_w,) * 2 + (pad_h + reach_h,) * 2)
    height, width = first.shape[2:]
    planes = []
    # One displacement at a time: all at once would copy the second map for each.
    for row, column in product(range(down[1]), range(across[1])):
        top, left = row * down[4], column * across[4]
        planes.append((first * second[:, :, top : top + height, left : left + width]).sum(1))
    products = torch.stack(planes, 1).unflatten(1, (down[1], across[1]))
    return sum(
        products[..., _taps(row, height, down), :][..., _taps(column, width, across)]
        for row, column in product(range(down[0]), range(across[0]))
    )


def _taps(tap: int, size: int, axis: tuple[int, ...]) -> slice:
    """Where one tap of the window falls, for all places of the window on an axis of the given size."""
    window, _, _, dilation, _, stride = axis
    last = tap * dilation + (size - (window - 1) * dilation - 1) // stride * stride
    return slice(tap * dilation, last + 1, stride)

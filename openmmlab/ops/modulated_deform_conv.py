"""Modulated deformable convolution (Zhu et al., 2019, equation 1): a factor on each sample beside its offset."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops.deform_conv import arguments, backward


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fills `output` with the convolution.

    Args:
        input: B C H W.
        weight: filters, C / group, kernel_h, kernel_w.
        bias: one per filter, read if `with_bias`.
        ones: scratch, not used.
        offset: B, deformable_group x taps x 2, output rows, output columns; (y, x) of each tap in input pixels.
        mask: B, deformable_group x taps, output rows, output columns; the factor on each sample.
        output: B, filters, output rows, output columns, filled in place.
        columns: scratch, not used.
        kernel_h: kernel height, as in `weight`.
        kernel_w: kernel width.
        stride_h: stride down.
        stride_w: stride across.
        pad_h: zeros added at the top and at the bottom.
        pad_w: zeros added at the left and at the right.
        dilation_h: distance of the taps down.
        dilation_w: distance of the taps across.
        group: groups of channels; each group has its own filters.
        deformable_group: groups of channels; each group has its own offsets and factors.
        with_bias: whether `bias` is added.

    `offset` and `mask` may have more rows and columns than the output, as DyHead gives them: see `_leading`.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _leading(offset, output), _leading(mask, output)
    tensors = arguments(input, weight, offset, mask, bias if with_bias else None, geometry)
    output.copy_(torch.ops.torchvision.deform_conv2d(*tensors))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fills the five gradients, the bias' gradient if `with_bias`; arguments as in the forward."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _leading(offset, grad_output), _leading(mask, grad_output)
    found = backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    # Views of tensors that the caller zeroed.
    grad_offset, grad_mask = _leading(grad_offset, grad_output), _leading(grad_mask, grad_output)
    wanted = (grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else []))
    for gradient, value in zip(wanted, found):
        gradient.copy_(value)


def _leading(per_tap: Tensor, output: Tensor) -> Tensor:
    """The part of offsets or factors that mmcv reads: each image's first numbers, laid out as `output`.

    DyHead applies the offsets of one level to the map of the next, half the size, and its weights were trained like
    that.

    Args:
        per_tap: B, deformable_group x taps (x 2), rows, columns; contiguous.
        output: B, filters, rows, columns.
    """
    if per_tap.shape[2:] == output.shape[2:]:
        return per_tap
    rows, columns = output.shape[2:]
    count = per_tap.shape[1]
    return per_tap.view(len(per_tap), -1)[:, : count * rows * columns].view(-1, count, rows, columns)

"""Deformable convolution (Dai et al., 2017, section 2.1): each kernel tap samples the input at a learned offset."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import at_least_single

FAR = 2.0**15  # pixels; off any map, and within float16


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fills `output` with the convolution.

    Args:
        input: B C H W.
        weight: filters, C / group, kH, kW.
        offset: B, deformable_group x kH x kW x 2, output rows, output columns; (y, x) of each tap in input pixels.
        output: B, filters, output rows, output columns, filled in place.
        columns: scratch, not used.
        ones: scratch, not used.
        kW: kernel width, as in `weight`.
        kH: kernel height.
        dW: stride across.
        dH: stride down.
        padW: zeros added at the left and at the right.
        padH: zeros added at the top and at the bottom.
        dilationW: distance of the taps across.
        dilationH: distance of the taps down.
        group: groups of channels; each group has its own filters.
        deformable_group: groups of channels; each group has its own offsets.
        im2col_step: not used; torchvision chooses its own step over the batch.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(torch.ops.torchvision.deform_conv2d(*arguments(input, weight, offset, None, None, geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fills `gradInput` and `gradOffset`, the gradients by the input and by the offsets; arguments as in the forward.

    torchvision computes all gradients in one call, so the weight's gradient is left in `columns`, the scratch tensor
    that mmcv next passes to `deform_conv_backward_parameters`.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grad_input, grad_weight, grad_offset, _, _ = backward(gradOutput, input, weight, offset, None, None, geometry)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)
    columns.resize_(weight.shape).copy_(grad_weight)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Fills `gradWeight`, the gradient by the weight, times `scale`; other arguments as in the forward.

    `columns` already holds it if `deform_conv_backward_input` was called before.
    """
    if columns.shape != gradWeight.shape:
        geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        # The gradient by the weight does not depend on the weight's values.
        _, columns, _, _, _ = backward(gradOutput, input, torch.zeros_like(gradWeight), offset, None, None, geometry)
    gradWeight.copy_(columns * scale)


def backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """The gradients by input, weight, offset, mask and bias; arguments as in `arguments`."""
    tensors = arguments(input, weight, offset, mask, bias, geometry)
    found = torch.ops.torchvision._deform_conv2d_backward(gradient.to(tensors[0].dtype), *tensors)
    # Exactly one pixel before the map, a sample is 0 on one side and nonzero on the other. With offsets of 0, as before
    # training, the taps on the padding are there. mmcv takes a slope of 0, torchvision the slope of the other side.
    found[2].masked_fill_(_positions(tensors[2], weight, geometry) == -1, 0)
    return found


def arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor | int | bool, ...]:
    """The arguments of torchvision's operator, in single precision at least.

    Args:
        input: B C H W.
        weight: filters, C / group, kernel rows, kernel columns.
        offset: as in `deform_conv_forward`.
        mask: B, deformable groups x kernel taps, output rows, output columns; a factor on each sample. None for 1.
        bias: one per filter; None for 0.
        geometry: stride, padding and dilation, each down and across; groups of filters; groups of offsets.
    """
    # torchvision reads outside its memory if an offset is NaN: the sample is set to 0 there, as in mmcv. It needs
    # tensors for mask and bias even if they do not affect the result.
    tensors = at_least_single(
        input,
        weight,
        offset.nan_to_num(nan=FAR).clamp(-FAR, FAR),
        input.new_zeros(len(input), 1) if mask is None else mask,
        input.new_zeros(len(weight)) if bias is None else bias,
    )
    return (*tensors, *geometry, mask is not None)


def _positions(offset: Tensor, weight: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """The input coordinate for each coordinate of the offsets: as `offset`."""
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _, groups = geometry
    sizes = (*weight.shape[2:], *offset.shape[2:])
    rows, columns, height, width = (torch.arange(size, device=offset.device) for size in sizes)
    y = rows[:, None, None, None] * dilation_h + height[:, None] * stride_h - pad_h
    x = columns[:, None, None] * dilation_w + width * stride_w - pad_w
    grid = torch.stack(torch.broadcast_tensors(y, x), 2).flatten(0, 1)  # taps 2 output rows, output columns
    return (offset.unflatten(1, (groups, -1, 2)) + grid).flatten(1, 3)

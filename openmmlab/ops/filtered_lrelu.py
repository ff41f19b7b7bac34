"""Leaky ReLU between an upsampling and a downsampling filter (Karras et al., 2021, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from terrazzo.openmmlab.ops.upfirdn2d import upfirdn2d

POSITIVE, NEGATIVE, CLAMPED = 0, 1, 2


def filtered_lrelu(
    x: Tensor,
    fu: Tensor,
    fd: Tensor,
    b: Tensor,
    si: Tensor,
    up: int,
    down: int,
    px0: int,
    px1: int,
    py0: int,
    py1: int,
    sx: int,
    sy: int,
    gain: float,
    slope: float,
    clamp: float,
    flip_filters: bool,
    writeSigns: bool,
) -> tuple[Tensor, Tensor, int]:
    """Bias, upsampling, leaky ReLU and downsampling.

    Args:
        x: B C H W.
        fu: the upsampling filter, rows x columns, or one for both axes.
        fd: the downsampling filter, likewise.
        b: the bias, C.
        si: as in `filtered_lrelu_act_`, as are sx, sy, gain, slope, clamp and writeSigns.
        up: upsampling per axis.
        down: downsampling per axis.
        px0: zeros added to the upsampled image at the left.
        px1: at the right.
        py0: at the top.
        py1: at the bottom.
        flip_filters: whether filters are correlated with the image, rather than convolved.

    Returns:
        The result, the signs, and 0, which tells mmcv that it need not do the work itself.
    """
    x = _resample(x + b[:, None, None], fu, up, 1, (px0, px1, py0, py1), flip_filters, up**2)
    signs = filtered_lrelu_act_(x, si, sx, sy, gain, slope, clamp, writeSigns)
    return _resample(x, fd, 1, down, (0, 0, 0, 0), flip_filters, 1), signs, 0


def filtered_lrelu_act_(
    x: Tensor, si: Tensor, sx: int, sy: int, gain: float, slope: float, clamp: float, writeSigns: bool
) -> Tensor:
    """Gain, leaky ReLU and clamp in place; or their derivative in place, by the signs of an earlier call.

    Args:
        x: B C H W.
        si: the signs of an earlier call, to take its derivative; or empty.
        sx: column of the signs that belongs to the first column of `x`.
        sy: row of the signs that belongs to the first row of `x`.
        gain: a factor, before the rest.
        slope: slope of the leaky ReLU below 0.
        clamp: the largest size of a result.
        writeSigns: whether signs are wanted.

    Returns:
        For each element of `x` whether it was positive, negative or clamped (0, 1, 2), or nothing. mmcv only passes
        this on; unlike the compiled operator's, it is not packed four to a byte.
    """
    x.mul_(gain)
    signs = torch.empty(0, dtype=torch.uint8, device=x.device)
    if si.numel():
        (rows, columns), (height, width) = si.shape[2:], x.shape[2:]
        # Outside the signs, which padding can reach, the derivative is only the gain.
        window = F.pad(si, (-sx, sx + width - columns, -sy, sy + height - rows), value=POSITIVE)
        x.mul_(x.new_tensor([1, slope, 0])[window.long()])
        return signs
    negative = x < 0
    x.copy_(torch.where(negative, x * slope, x))
    if writeSigns:
        signs = torch.where(x.abs() > clamp, CLAMPED, negative).to(torch.uint8)
    x.clamp_(-clamp, clamp)
    return signs


def _resample(
    x: Tensor, filter: Tensor, up: int, down: int, padding: tuple[int, int, int, int], flip: bool, gain: float
) -> Tensor:
    """The images resampled alike on both axes, by a two-dimensional filter or by one filter for both axes."""
    if filter.dim() == 2:
        return upfirdn2d(x, filter, up, up, down, down, *padding, flip, gain)
    x = upfirdn2d(x, filter[None], up, 1, down, 1, *padding[:2], 0, 0, flip, 1)
    return upfirdn2d(x, filter[:, None], 1, up, 1, down, 0, 0, *padding[2:], flip, gain)

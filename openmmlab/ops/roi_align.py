"""RoIAlign (He et al., 2017, section 3): bilinear samples in each bin of a region, averaged or maximised."""

import math

import torch
from torch import Tensor

MAX, AVERAGE = 0, 1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` with the pooled features of each region.

    Args:
        input: B C H W.
        rois: N x 5, as index in the batch, x1 y1 x2 y2 in image pixels.
        output: N C aligned_height aligned_width, filled in place.
        argmax_y: as `output`, filled with the row of the largest sample; empty for the average.
        argmax_x: as `output`, filled with the column of the largest sample; empty for the average.
        aligned_height: bins down.
        aligned_width: bins across.
        spatial_scale: map pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 takes ceil(bin size).
        pool_mode: 0 the largest sample of a bin, 1 the average. A bin without samples gives 0 either way.
        aligned: whether pixel centres lie at +0.5.
    """
    features, regions = _computable(input), _computable(rois, like=_computable(input))
    if pool_mode == AVERAGE:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features, regions, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
            )
        )
        return
    bins = (aligned_height, aligned_width)
    for index, (batch, ys, xs) in enumerate(_samples(regions, bins, spatial_scale, sampling_ratio, aligned)):
        if ys.numel() == 0 or xs.numel() == 0:
            output[index], argmax_y[index], argmax_x[index] = 0, -1, -1
            continue
        # Interpolation is separable: one small matrix for rows, one for columns.
        rows = _interpolation(ys.flatten(), features.shape[2])
        columns = _interpolation(xs.flatten(), features.shape[3])
        values = rows @ features[batch] @ columns.T  # C bins*samples bins*samples
        values = values.unflatten(2, tuple(xs.shape)).unflatten(1, tuple(ys.shape))  # C bins samples bins samples
        values = values.transpose(2, 3).flatten(3)  # C bins bins samples*samples
        largest, place = values.max(dim=3)
        output[index] = largest
        per_row = xs.shape[1]
        argmax_y[index] = ys[torch.arange(bins[0], device=ys.device)[:, None], place // per_row]
        argmax_x[index] = xs[torch.arange(bins[1], device=xs.device)[None, :], place % per_row]


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input` with the gradient of `roi_align_forward` with respect to its input; arguments as there."""
    gradient = _computable(grad_output)
    regions = _computable(rois, like=gradient)
    if pool_mode == AVERAGE:
        sizes = (*grad_input.shape, sampling_ratio, aligned)
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                gradient, regions, spatial_scale, aligned_height, aligned_width, *sizes
            )
        )
        return
    batch, channels, height, width = grad_input.shape
    total = gradient.new_zeros(batch * channels, height * width)
    plane = regions[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # N C
    plane = plane[:, :, None, None].expand(grad_output.shape)
    valid = (argmax_y != -1) | (argmax_x != -1)
    for y, weight_y in _neighbours(_computable(argmax_y, like=gradient), height):
        for x, weight_x in _neighbours(_computable(argmax_x, like=gradient), width):
            total.view(-1).index_add_(
                0,
                (plane * height * width + y * width + x)[valid],
                (gradient * weight_y * weight_x)[valid],
            )
    grad_input.copy_(total.view_as(grad_input))


def _computable(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """In the precision of `like`, or else in single precision at least, which torchvision computes on every device."""
    if like is not None:
        return tensor.to(like.dtype)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _samples(rois: Tensor, bins: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool):
    """Yields for each region its index in the batch and the rows and columns of its samples, each bins x samples."""
    shift = 0.5 if aligned else 0.0
    for batch, *box in rois.tolist():
        x1, y1, x2, y2 = (value * scale - shift for value in box)
        axes = []
        for start, extent, count in ((y1, y2 - y1, bins[0]), (x1, x2 - x1, bins[1])):
            size = (extent if aligned else max(extent, 1.0)) / count
            grid = sampling_ratio if sampling_ratio > 0 else max(math.ceil(size), 0)
            steps = torch.arange(count, device=rois.device, dtype=rois.dtype)[:, None]
            inner = (torch.arange(grid, device=rois.device, dtype=rois.dtype) + 0.5) / max(grid, 1)
            axes.append(start + (steps + inner) * size)
        yield int(batch), *axes


def _neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels between which each position lies on an axis, with their weights: 0 where it is off the map."""
    inside = (position >= -1) & (position <= size)
    clamped = position.clamp(0, size - 1)
    low = clamped.floor()
    high = (low + 1).clamp(max=size - 1)
    fraction = clamped - low
    return [(low.long(), (1 - fraction) * inside), (high.long(), fraction * inside)]


def _interpolation(position: Tensor, size: int) -> Tensor:
    """The matrix (positions x size) that takes linear samples of a vector of `size` at the positions."""
    matrix = position.new_zeros(len(position), size)
    for pixel, weight in _neighbours(position, size):
        matrix.scatter_add_(1, pixel[:, None], weight[:, None])
    return matrix

"""Convolutions, pools and resizes of a map that several ranks share."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.errors import InputError
from terrazzo.spatial._cuts import Level
from terrazzo.spatial._part import Needs, Part


def pair(value: Any) -> tuple[int, int]:
    """A module's option for rows and columns."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def own(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """The module's own forward pass, on the rank's rows alone."""
    return type(module).forward(module, *arguments, **options)


def reach(out: Level, stride: int, before: int, extent: int) -> Needs:
    """The input rows that the output rows need.

    Args:
        out: The output's size.
        before: Rows of padding above the map.
        extent: Rows between the first and the last row that an output row reads, both included.
    """
    return [(start * stride - before, (end - 1) * stride - before + extent) for start, end in out.rows]


def padding(conv: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows above and below, columns on the left and on the right."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":
        totals = [step * (side - 1) for step, side in zip(conv.dilation, conv.kernel_size)]
        return tuple((total // 2, total - total // 2) for total in totals)  # type: ignore[return-value]
    return tuple((side, side) for side in conv.padding)  # type: ignore[return-value]


def convolve(part: Part, conv: nn.Conv2d, x: torch.Tensor, excess: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """A convolution of (B, C, H, W) with zero padding.

    Args:
        excess: Additional rows of zeros below the map, and columns on its right.
    """
    kernel, stride, step = conv.kernel_size, conv.stride, conv.dilation
    (top, bottom), (left, right) = padding(conv)
    bottom, right = bottom + excess[0], right + excess[1]
    if kernel == stride == (1, 1) and not (top or bottom or left or right):
        return own(conv, x)
    level = part.level(x)
    extents = [d * (k - 1) + 1 for d, k in zip(step, kernel)]
    height = (level.height + top + bottom - extents[0]) // stride[0] + 1
    width = (level.width + left + right - extents[1]) // stride[1] + 1
    out = part.strided(level, stride[0], height, width)
    x = part.exchange(x, 2, level, reach(out, stride[0], top, extents[0]))
    if left != right:
        x, left = F.pad(x, (left, right)), 0
    return F.conv2d(x, conv.weight, conv.bias, stride, (0, left), step, conv.groups)


def convolve_transposed(part: Part, conv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """A transposed convolution of (B, C, H, W): input row i adds to the output rows i stride - padding + 0, 1, ..."""
    level = part.level(x)
    extents = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size)]
    height, width = (
        (length - 1) * stride - 2 * pad + extent + more
        for length, stride, pad, extent, more in zip(
            (level.height, level.width), conv.stride, conv.padding, extents, conv.output_padding
        )
    )
    out = part.enlarged(level, conv.stride[0], height, width)
    stride, pad = conv.stride[0], conv.padding[0]
    needs = [
        (
            max(0, -((extents[0] - 1 - start - pad) // stride)),
            min(level.height, (end - 1 + pad) // stride + 1),
        )
        for start, end in out.rows
    ]
    x = part.exchange(x, 2, level, needs)
    start, end = out.rows[part.rank]
    first = needs[part.rank][0] * stride - pad  # the output row of the first row computed here
    rows = end - first
    missing = rows - ((x.shape[2] - 1) * stride + extents[0])  # rows of output padding, which have the bias alone
    y = F.conv_transpose2d(
        x,
        conv.weight,
        conv.bias,
        conv.stride,
        (0, conv.padding[1]),
        (max(0, missing), conv.output_padding[1]),
        conv.groups,
        conv.dilation,
    )
    return y[:, :, start - first : rows]


def _pooled_length(length: int, kernel: int, stride: int, pad: int, step: int, ceil: bool) -> int:
    extent = step * (kernel - 1) + 1
    span = length + 2 * pad - extent
    count = (-(-span // stride) if ceil else span // stride) + 1
    # A window beyond the padding on the left is left out.
    return count - 1 if ceil and (count - 1) * stride >= length + pad else count


def pool(
    part: Part,
    x: torch.Tensor,
    module: nn.Module,
    step: tuple[int, int],
    fill: float,
    run: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[torch.Tensor, Level, Level]:
    """Pool (B, C, H, W): `run` takes the rows with padding, and the padding of columns.

    Returns:
        The result, the input's size and the output's size.
    """
    kernel, pad = pair(module.kernel_size), pair(module.padding)
    stride = pair(module.kernel_size if module.stride is None else module.stride)
    level = part.level(x)
    height, width = (
        _pooled_length(length, k, s, p, d, module.ceil_mode)
        for length, k, s, p, d in zip((level.height, level.width), kernel, stride, pad, step)
    )
    out = part.strided(level, stride[0], height, width)
    x = part.exchange(x, 2, level, reach(out, stride[0], pad[0], step[0] * (kernel[0] - 1) + 1), fill)
    return run(x, pad[1]), level, out


def max_pool(part: Part, module: nn.MaxPool2d, x: torch.Tensor) -> torch.Tensor:
    stride = module.kernel_size if module.stride is None else module.stride
    step = pair(module.dilation)

    def run(x: torch.Tensor, pad: int) -> torch.Tensor:
        return F.max_pool2d(x, module.kernel_size, stride, (0, pad), step, module.ceil_mode)

    return pool(part, x, module, step, -torch.inf, run)[0]


def average_pool(part: Part, module: nn.AvgPool2d, x: torch.Tensor) -> torch.Tensor:
    """Sums, divided by the numbers of pixels that PyTorch counts for windows at borders."""
    kernel, pad = pair(module.kernel_size), pair(module.padding)
    stride = pair(module.kernel_size if module.stride is None else module.stride)

    def run(x: torch.Tensor, columns: int) -> torch.Tensor:
        return F.avg_pool2d(x, kernel, stride, (0, columns), module.ceil_mode, divisor_override=1)

    y, level, out = pool(part, x, module, (1, 1), 0.0, run)
    if module.divisor_override:
        return y / module.divisor_override

    def counts(first: int, last: int, axis: int, length: int) -> torch.Tensor:
        start = torch.arange(first, last, device=y.device) * stride[axis] - pad[axis]
        end = start + kernel[axis]
        if module.count_include_pad:
            return (end.clamp(max=length + pad[axis]) - start).to(y.dtype)
        return (end.clamp(max=length) - start.clamp(min=0)).to(y.dtype)

    first, last = out.rows[part.rank]
    return y / (counts(first, last, 0, level.height)[:, None] * counts(0, out.width, 1, level.width))


def adaptive_average(part: Part, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Adaptive average pooling of (B, C, H, W) to a small map, which every rank gets as a whole."""
    level = part.level(x)
    part.whole(*size)
    if level.whole:
        return F.adaptive_avg_pool2d(x, size)
    rows, columns = (_cells(count, length, x) for count, length in zip(size, (level.height, level.width)))
    start, end = level.rows[part.rank]
    return part.total(rows[:, start:end] @ (x @ columns.T))


def _cells(count: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """(count, length) weights; their product with a side is its adaptive average pooling."""
    out = torch.zeros(count, length, dtype=like.dtype)
    for cell in range(count):
        first, last = cell * length // count, -(-(cell + 1) * length // count)
        out[cell, first:last] = 1 / (last - first)
    return out.to(like.device)


def greatest(part: Part, x: torch.Tensor) -> torch.Tensor:
    """The maximum over rows and columns of the whole map (B, C, H, W) as (B, C, 1, 1), on every rank."""
    level = part.level(x)
    found = x.amax((2, 3), keepdim=True)
    return found if level.whole else part.stacked(found).amax(0)


def resize(
    part: Part,
    x: torch.Tensor,
    size: tuple[int, int],
    mode: str = "nearest",
    align_corners: bool | None = None,
    scales: tuple[float, float] | None = None,
    levels: tuple[Level, Level] | None = None,
) -> torch.Tensor:
    """`F.interpolate` of (B, C, H, W); scale and offset come from the sizes of the whole maps.

    Args:
        size: Rows and columns of the whole result.
        scales: The `scale_factor` that PyTorch would use in place of the sizes; None for the sizes.
        levels: The sizes of the map and of the result, if no other operator knows them; None for known sizes.

    Raises:
        InputError: The mode is unknown, or the number of rows is no multiple or fraction of the input's.
    """
    level = part.level(x) if levels is None else levels[0]
    if mode not in ("nearest", "nearest-exact", "bilinear", "bicubic"):
        raise InputError(f"{part.at} resizes by '{mode}', which is not known here: use nearest, bilinear or bicubic")
    out = _resized_level(part, level, size) if levels is None else levels[1]
    first, last = out.rows[part.rank]
    place, weight = _taps(first, last, level.height, size[0], mode, bool(align_corners), scales and scales[0], x)
    needs = []
    for start, end in out.rows:
        taps = _taps(start, end, level.height, size[0], mode, bool(align_corners), scales and scales[0], x)[0]
        needs.append((int(taps.min()), int(taps.max()) + 1))
    x = part.exchange(x, 2, level, needs)
    exact = dict(align_corners=align_corners) if mode in ("bilinear", "bicubic") else {}
    if size[1] != level.width or (scales and scales[1] != 1):
        if scales:  # PyTorch computes rows from a factor of 1, which leaves them as they are
            x = F.interpolate(x, scale_factor=(1.0, scales[1]), mode=mode, **exact)
        else:
            x = F.interpolate(x, size=(x.shape[2], size[1]), mode=mode, **exact)
    place = place.to(x.device) - needs[part.rank][0]
    if weight is None:
        return x.index_select(2, place[:, 0])
    weight = weight.to(x.device)
    parts = [x.index_select(2, place[:, i]) * weight[:, i, None] for i in range(place.shape[1])]
    return sum(parts[1:], parts[0])


def _resized_level(part: Part, level: Level, size: tuple[int, int]) -> Level:
    """The size of the result: a known size of this many rows and columns, or rows in proportion."""
    if level.whole:
        known = [other for other in part.levels() if (other.height, other.width) == size]
        return known[0] if known else part.whole(*size)
    known = [other for other in part.levels() if (other.height, other.width) == size and not other.whole]
    if known:
        return known[0]
    if size[0] >= level.height:
        factor = math.ceil(size[0] / level.height)
        return part.enlarged(level, factor, *size)
    return part.strided(level, round(level.height / size[0]), *size)


def _taps(
    first: int,
    last: int,
    old: int,
    new: int,
    mode: str,
    align_corners: bool,
    scale: float | None,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows that each output row reads, and their weights (None for a copy), computed as PyTorch does."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    index = torch.arange(first, last, dtype=dtype if mode[0] == "b" else torch.float32)
    if align_corners:
        ratio = torch.tensor((old - 1) / (new - 1) if new > 1 else 0.0, dtype=index.dtype)
    else:
        ratio = torch.tensor(1 / scale if scale else old / new, dtype=index.dtype)
    if mode == "nearest":
        return (index * ratio).floor().long().clamp(max=old - 1)[:, None], None
    if mode == "nearest-exact":
        return ((index + 0.5) * ratio).floor().long().clamp(max=old - 1)[:, None], None
    place = index * ratio if align_corners else (index + 0.5) * ratio - 0.5
    if mode == "bilinear":
        place = place.clamp(min=0)
        low = place.floor().long().clamp(max=old - 1)
        share = (place - low).clamp(0, 1)
        return torch.stack([low, (low + 1).clamp(max=old - 1)], 1), torch.stack([1 - share, share], 1).to(like.dtype)
    low = place.floor()
    share = place - low
    taps = (low.long()[:, None] + torch.arange(-1, 3)).clamp(0, old - 1)
    distance = (share[:, None] - torch.arange(-1, 3)).abs()
    inner = (1.25 * distance - 2.25) * distance**2 + 1
    outer = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3
    return taps, torch.where(distance <= 1, inner, outer).to(like.dtype)

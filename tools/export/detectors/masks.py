"""Masks inside an exported graph: from the small masks of boxes to masks of the image, and from masks to boxes."""

import torch
from torch import Tensor


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Each mask stretched over its box, bilinearly, and 0 elsewhere; as mmdet's `FCNMaskHead` pastes on the CPU.

    Bilinear sampling on a grid of rows and columns is a product with one matrix for the rows and one for the columns,
    which takes less memory than a grid of points for every mask.

    Args:
        masks: N h w.
        boxes: N x 4, x1 y1 x2 y2 in pixels.
        size: H, W of the image.

    Returns:
        N H W.
    """
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(1)
    return _weights(y1, y2, height, masks.shape[1]) @ masks @ _weights(x1, x2, width, masks.shape[2]).transpose(1, 2)


def _weights(start: Tensor, end: Tensor, pixels: int, cells: int) -> Tensor:
    """How much of each cell between `start` and `end` (both N) there is in each pixel of a line: N, pixels, cells."""
    start, end = start[:, None], end[:, None]
    pixel = torch.arange(pixels, dtype=start.dtype, device=start.device)
    place = (pixel + 0.5 - start) / (end - start) * cells - 0.5
    # in a box without extent mmdet sees the middle of the mask
    place = torch.where(end > start, place, (cells - 1) / 2)
    weights = (1 - (place[..., None] - torch.arange(cells, dtype=start.dtype, device=start.device)).abs()).clamp(min=0)
    near = (pixel >= start.floor() - 1) & (pixel < end.ceil() + 1)
    return weights * near[..., None].to(weights.dtype)


def as_bytes(inside: Tensor) -> Tensor:
    """Booleans as bytes 0 and 1, by way of floats: TensorRT converts only floats to bytes."""
    return inside.float().to(torch.uint8)


def boxes_of(masks: Tensor) -> Tensor:
    """The smallest boxes (N, 4), x1 y1 x2 y2 in pixels, around boolean masks (N, H, W); 0 for an empty mask."""
    (x1, x2), (y1, y2) = (_ends(masks.any(dim=axis)) for axis in (1, 2))
    return torch.stack([x1, y1, x2, y2], dim=1).to(torch.float32)


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """The first true index of each line (N, L) and the index after the last; both 0 without any."""
    line = line.to(torch.int64)
    length = line.shape[1]
    count = torch.arange(1, length + 1, device=line.device)
    last = (line * count).amax(dim=1)
    first = length - (line * count.flip(0)).amax(dim=1)
    return torch.where(last > 0, first, 0), last

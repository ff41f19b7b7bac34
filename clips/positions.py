"""Sine positions of the pixels of a clip."""

import math

import torch

from terrazzo.errors import InputError


def positions_3d(
    frames: int,
    height: int,
    width: int,
    dim: int,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sine positions (T, H, W, C) of a clip's pixels: sines of rows and of columns side by side, plus sines of frames.

    An index, from 1, is divided by the largest one plus 1e-6 and multiplied by 2 pi. Even channels are sines and odd
    channels cosines. Rows have the first half of the channels, columns the second half, and frames all channels.

    Args:
        frames, height, width: T, H, W.
        dim: C, a multiple of 4.
        temperature: Ratio of the longest wave's length to the length of the shortest wave.
        device, dtype: Device and type of the result. The authors compute in float32.

    Raises:
        InputError: C is not a multiple of 4.

    Source: `PositionEmbeddingSine3D` of the authors' code; mmdet's `SinePositionalEncoding3D` gives the same, in
    float32 only.
    """
    if dim < 1 or dim % 4:
        raise InputError(f"dim must be a multiple of 4, got {dim}")

    def waves(count: int, channels: int) -> torch.Tensor:
        index = torch.arange(1, count + 1, device=device, dtype=dtype) / (count + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, channels, 2, device=device, dtype=dtype) / channels
        angles = index[:, None] / temperature**exponent
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    rows, columns = waves(height, dim // 2), waves(width, dim // 2)
    plane = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], -1)
    return plane + waves(frames, dim)[:, None, None]

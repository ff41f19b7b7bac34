"""Bicubic resizing as MATLAB's `imresize`, by which pictures are made small for super-resolution."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from terrazzo.degradations.pixels import in_8_bits
from terrazzo.errors import InputError

_SUPPORT = 2
"""Pixels of the coarser grid that Keys' cubic kernel reaches from its centre."""


class Bicubic:
    """Makes a picture `scale` times smaller, in steps of 1/255, as the low-resolution files of benchmarks are.

    Args:
        scale: a whole number from 2.

    Raises:
        InputError: the scale is another number.
    """

    task = "super-resolution"

    def __init__(self, scale: int):
        if type(scale) is not int or scale < 2:
            raise InputError(f"the scale of Bicubic is {scale!r}; it must be a whole number from 2")
        self.scale, self.reach = scale, _SUPPORT * scale

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """From (3, H, W) to (3, H / scale, W / scale); nothing is random."""
        return in_8_bits(reduced(clean, self.scale))


def reduced(pixels: Tensor, scale: int) -> Tensor:
    """From (C, H, W) to (C, H / scale, W / scale), as MATLAB's `imresize(pixels, 1 / scale, "bicubic")`.

    Keys' kernel (IEEE TASSP 29(6), 1981) with a = -1/2 is stretched by the scale, against aliasing; pixels beyond the
    border are mirrored, and the border pixel is repeated. PyTorch's antialiased kernel is the same, but it drops the
    weights beyond the border, so the picture is mirrored first.

    Raises:
        InputError: H or W is no multiple of the scale.
    """
    height, width = pixels.shape[-2:]
    if height % scale or width % scale:
        raise InputError(f"a picture of {height}x{width} pixels has no multiples of the scale {scale} as its sides")
    return _resized(pixels, (height // scale, width // scale), _SUPPORT * scale, _SUPPORT)


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    """From (C, H, W) to (C, scale H, scale W), as MATLAB's `imresize(pixels, scale, "bicubic")`; see `reduced`."""
    if scale == 1:
        return pixels
    height, width = pixels.shape[-2:]
    return _resized(pixels, (height * scale, width * scale), _SUPPORT, _SUPPORT * scale)


def _resized(pixels: Tensor, size: tuple[int, int], margin: int, cut: int) -> Tensor:
    """To `size`, with `margin` mirrored pixels around the picture, which become `cut` pixels."""
    mirrored = _mirrored(_mirrored(pixels, margin, -1), margin, -2)
    wanted = [side + 2 * cut for side in size]
    found = interpolate(mirrored[None], wanted, mode="bicubic", align_corners=False, antialias=True)[0]
    return found[..., cut : cut + size[0], cut : cut + size[1]]


def _mirrored(pixels: Tensor, margin: int, axis: int) -> Tensor:
    """Mirrored pixels on both ends of an axis, the border pixel twice; as often as the margin takes."""
    length = pixels.shape[axis]
    places = torch.arange(-margin, length + margin, device=pixels.device) % (2 * length)
    return pixels.index_select(axis, torch.minimum(places, 2 * length - 1 - places))

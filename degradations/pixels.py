"""Pictures as tensors of values in 0..1, and back."""

import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image) -> Tensor:
    """A picture in RGB as (3, H, W), float32 in 0..1."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Values (3, H, W) as a picture of 8 bits; values beyond 0..1 are cut off."""
    values = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def in_8_bits(pixels: Tensor) -> Tensor:
    """Values as a picture file keeps them: 0..1 in steps of 1/255."""
    return (pixels.clamp(0, 1) * 255).round() / 255


def generator_of(name: str) -> torch.Generator:
    """A generator for the picture of this name: always the same numbers, in every process."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode(errors="surrogateescape")))


def in_multiples(pixels: Tensor, unit: int) -> Tensor:
    """Pixels (..., H, W) without the last rows and columns beyond a multiple of the unit."""
    height, width = (side // unit * unit for side in pixels.shape[-2:])
    return pixels[..., :height, :width]

"""A U-shaped decoder from a pyramid to a restored picture."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import interpolate

from terrazzo.errors import InputError

_WIDEST = 8
"""The widest level has this many times the channels of the level of stride 1."""


@MODELS.register_module()
class RestorerUNet(BaseModule):
    """Restores a picture from the maps of an encoder: the picture, bicubically enlarged, plus a correction.

    The levels of stride 1, 2, ... that lie before the encoder's finest map are convolutions of the picture. From the
    coarsest level on, each level is brought to twice its size by a 1x1 convolution and a pixel shuffle (arXiv
    1609.05158), and the next finer level of the encoder is added through a 1x1 convolution, as in a feature pyramid;
    then follow residual blocks without norms (EDSR, arXiv 1707.02921). The last convolution begins at zero, so an
    untrained model gives the enlarged picture itself. Every layer looks only a few pixels far; how far the whole looks
    is up to the encoder.

    Args:
        in_channels, strides: of the encoder's maps, finest first; each stride is twice the stride before.
        channels: of the level of stride 1; they double from level to level, up to 8 times as many.
        depth: residual blocks of each level.
        upscale: how many times larger the restored picture is.
        init_cfg: mmengine's; by default PyTorch's initialisation stays.

    Attributes:
        stride: the coarsest level's; the sides of pictures are multiples of it.
        upscale: as the argument.

    Raises:
        InputError: the strides do not double, or another number is below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        channels: int = 32,
        depth: int = 1,
        upscale: int = 1,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if any(finer * 2 != coarser for finer, coarser in pairwise(strides)) or strides[0].bit_count() != 1:
            raise InputError(
                f"RestorerUNet needs maps whose strides are powers of 2 and double, and gets {tuple(strides)}; choose "
                "other out_indices or another backbone"
            )
        for name, value in (("channels", channels), ("depth", depth), ("upscale", upscale)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name} of RestorerUNet is {value!r}; it must be a whole number from 1")
        self.stride, self.upscale = strides[-1], upscale
        own = strides[0].bit_length() - 1  # levels before the encoder's finest
        widths = [channels * min(2**level, _WIDEST) for level in range(own + len(strides))]
        self.stem = nn.ModuleList(
            nn.Conv2d(before, width, 3, stride=1 if level == 0 else 2, padding=1)
            for level, (before, width) in enumerate(zip([3, *widths[: own - 1]], widths[:own]))
        )
        lateral = [*widths[:own], *in_channels]
        self.laterals = nn.ModuleList(nn.Conv2d(ours, width, 1) for ours, width in zip(lateral, widths))
        self.finer = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2)) for fine, coarse in pairwise(widths)
        )
        self.blocks = nn.ModuleList(nn.Sequential(*[_Block(width) for _ in range(depth)]) for width in widths)
        self.last = nn.Sequential(nn.Conv2d(widths[0], 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """From the picture (B, 3, H, W) in 0..1 and the encoder's maps to (B, 3, upscale H, upscale W)."""
        levels = []
        x = image
        for layer in self.stem:
            x = torch.relu(layer(x))
            levels.append(x)
        levels += maps
        x = self.blocks[-1](self.laterals[-1](levels[-1]))
        for level in reversed(range(len(levels) - 1)):
            x = self.blocks[level](self.finer[level](x) + self.laterals[level](levels[level]))
        size = [side * self.upscale for side in image.shape[-2:]]
        # a = -3/4: OpenVINO silently takes MATLAB's kernel (-1/2), which is PyTorch's with antialias=True, for this
        base = image if self.upscale == 1 else interpolate(image, size, mode="bicubic", align_corners=False)
        return base + self.last(x)


class _Block(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))

"""A level of stride 4 for backbones that begin at stride 8."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class FinerLevel(BaseModule):
    """Puts a level of half the stride before a pyramid's levels, then runs another neck on all levels.

    A transposed 2x2 convolution with stride 2 makes the level from the finest map, as in LightViT's detectors (arXiv
    2207.05557). A map of ceil(H/8) x ceil(W/8) positions gives 2 ceil(H/8) x 2 ceil(W/8) positions.

    Args:
        in_channels: the channels of the backbone's maps, finest first.
        neck: the settings of the next neck, without its `in_channels`: they are these, with the first twice.
        init_cfg: mmengine's.
    """

    def __init__(self, in_channels: Sequence[int], neck: dict, init_cfg: dict | None = None):
        super().__init__(init_cfg or dict(type="Xavier", layer="ConvTranspose2d", distribution="uniform"))
        finest = in_channels[0]
        self.finer = nn.ConvTranspose2d(finest, finest, 2, stride=2)
        self.neck = MODELS.build(dict(neck, in_channels=[finest, *in_channels]))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From maps B C H W of strides s, 2 s, ... to the neck's results for strides s / 2, s, 2 s, ..."""
        return self.neck((self.finer(maps[0]), *maps))

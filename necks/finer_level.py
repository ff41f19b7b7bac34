"""A level of stride 4 for backbones that begin at stride 8."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class FinerLevel(BaseModule):
    """Puts a level of half the stride before a pyramid's, then runs another neck on all of them.

    The level is a transposed 2x2 convolution of stride 2 of the finest map, as LightViT's detectors have it (arXiv
    2207.05557). Of a map of ceil(H/8) x ceil(W/8) positions it makes 2 ceil(H/8) x 2 ceil(W/8).

    Args:
        in_channels: of the backbone's maps, finest first.
        neck: of the neck behind, without its `in_channels`, which are these with the first twice.
        init_cfg: mmengine's.
    """

    def __init__(self, in_channels: Sequence[int], neck: dict, init_cfg: dict | None = None):
        super().__init__(init_cfg or dict(type="Xavier", layer="ConvTranspose2d", distribution="uniform"))
        finest = in_channels[0]
        self.finer = nn.ConvTranspose2d(finest, finest, 2, stride=2)
        self.neck = MODELS.build(dict(neck, in_channels=[finest, *in_channels]))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps B C H W of strides s, 2 s, ... to what the neck makes of those of strides s / 2, s, 2 s, ..."""
        return self.neck((self.finer(maps[0]), *maps))

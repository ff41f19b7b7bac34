"""A pyramid out of the one map of a plain backbone."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn


@MODELS.register_module()
class PlainPyramid(BaseModule):
    """Maps of a quarter, half, all and twice the stride of a map, then another neck, if any, on all of them.

    Two transposed 2x2 convolutions of stride 2 with LayerNorm and GELU between them, one, none, and the maximum over
    2x2, as the segmentors of RoMA (arXiv 2503.10392), BEiT and MAE have it; parameters carry the names that RoMA's code
    gives them. The maximum of an odd side's last row or column is of what is there, so that sides are ceil(side / 2).

    Args:
        in_channels: of the one map, in a list.
        neck: of a neck behind, without its `in_channels`, which are four times these; None for none.
        init_cfg: mmengine's.
    """

    def __init__(self, in_channels: Sequence[int], neck: dict | None = None, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        (width,) = in_channels
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            LayerNorm2d(width, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.fpn2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.fpn4 = nn.MaxPool2d(2, ceil_mode=True)
        self.neck = None if neck is None else MODELS.build(dict(neck, in_channels=[width] * 4))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map B C H W of stride s, in a sequence, to what the neck makes of those of s / 4, s / 2, s and 2 s."""
        (x,) = maps
        maps = (self.fpn1(x), self.fpn2(x), x, self.fpn4(x))
        return maps if self.neck is None else tuple(self.neck(maps))

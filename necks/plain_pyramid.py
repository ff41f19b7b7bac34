"""A pyramid from the single map of a plain backbone."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn


@MODELS.register_module()
class PlainPyramid(BaseModule):
    """Makes maps of 1/4, 1/2, 1 and 2 times a map's stride, then runs another neck, if any, on all of them.

    The levels are: two transposed 2x2 convolutions with stride 2, with LayerNorm and GELU between them; one transposed
    convolution; the map itself; and the maximum over 2x2. The segmentors of RoMA (arXiv 2503.10392), BEiT and MAE have
    the same levels; parameters have the names in RoMA's code. The maximum keeps an odd side's last row or column, so
    sides are ceil(side / 2).

    Args:
        in_channels: the channels of the single map, in a list.
        neck: the settings of the next neck, without its `in_channels`: they are these, four times. None for no neck.
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
        """From a sequence of one map B C H W of stride s to the neck's results for strides s / 4, s / 2, s and 2 s."""
        (x,) = maps
        maps = (self.fpn1(x), self.fpn2(x), x, self.fpn4(x))
        return maps if self.neck is None else tuple(self.neck(maps))

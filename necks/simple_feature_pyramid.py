"""A pyramid from the single map of a plain backbone."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from terrazzo.errors import InputError


def _level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """The map at another scale, then a 1x1 and a 3x3 convolution, each with a norm and without a bias."""
    if scale == 4:
        half, quarter = channels // 2, channels // 4
        resized = [
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
    elif scale == 2:
        quarter = channels // 2
        resized = [nn.ConvTranspose2d(channels, quarter, 2, stride=2)]
    else:
        quarter = channels
        resized = [nn.MaxPool2d(2, stride=2, ceil_mode=True)] if scale == 0.5 else []
    return nn.Sequential(
        *resized,
        nn.Conv2d(quarter, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """ViTDet's neck: every level is made from the last map of a plain backbone, none from another level.

    From a map of stride 16, two, one and no transposed 2x2 convolutions make the levels of stride 4, 8 and 16, and a
    2x2 maximum makes the level of stride 32; the maximum keeps the last row and column of an odd side. Further levels
    subsample the last level.

    Args:
        in_channels: the channels of the backbone's map, or of its maps; the last map is taken.
        out_channels: the channels of every level.
        scales: the levels' sizes, finest first: 4, 2, 1 or 0.5 times the map's size.
        num_outs: number of levels; each level beyond `scales` halves the level before.
        init_cfg: mmengine's; by default PyTorch's initialisation stays.

    Raises:
        InputError: a scale is not one of these four, or there are fewer outputs than scales.

    Source: ViTDet, arXiv 2203.16527, section 3 and appendix A.2.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if not scales or not set(scales) <= {4, 2, 1, 0.5}:
            raise InputError(f"scales must be among 4, 2, 1 and 0.5, got {tuple(scales)}")
        if num_outs < len(scales):
            raise InputError(f"num_outs must be at least the {len(scales)} scales, got {num_outs}")
        channels = in_channels if isinstance(in_channels, int) else in_channels[-1]
        self.levels = nn.ModuleList(_level(channels, out_channels, scale) for scale in scales)
        self.further = num_outs - len(scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From maps B C H W to `num_outs` levels, finest first; only the last map is read."""
        out = [level(maps[-1]) for level in self.levels]
        for _ in range(self.further):
            out.append(out[-1][:, :, ::2, ::2])
        return tuple(out)

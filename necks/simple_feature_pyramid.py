"""A pyramid from the single map of a plain backbone."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from terrazzo.backbones._feature_pyramid import level
from terrazzo.errors import InputError


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
        self.levels = nn.ModuleList(level(channels, out_channels, scale) for scale in scales)
        self.further = num_outs - len(scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """From maps B C H W to `num_outs` levels, finest first; only the last map is read."""
        out = [layers(maps[-1]) for layers in self.levels]
        for _ in range(self.further):
            out.append(out[-1][:, :, ::2, ::2])
        return tuple(out)

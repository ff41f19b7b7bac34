"""A backbone for detectron2: registered by name for its YAML configs, and a class factory for its lazy configs.

detectron2 has no wheel and its sources need a compiler, so the tests run this against a stand-in of its interface.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from terrazzo.integrations._frameworks import framework
from terrazzo.integrations.maps import Maps

_INSTALL = "'git+https://github.com/facebookresearch/detectron2'"


@functools.cache
def backbone_class() -> type[nn.Module]:
    """The class `TerrazzoBackbone`, a subclass of detectron2's `Backbone`.

    It has the arguments of `Maps`; its maps are named "res2" (stride 4) to "res5" (stride 32), as detectron2's FPN and
    heads expect.

    Raises:
        BackendError: detectron2 is not installed.
    """
    modeling = framework("detectron2.modeling", _INSTALL)

    class TerrazzoBackbone(modeling.Backbone):
        """Maps of a timm model by name, finest first."""

        def __init__(
            self, name: str, pretrained: bool = False, out_indices: Sequence[int] | None = None, **kwargs: Any
        ):
            super().__init__()
            self.maps = Maps(name, pretrained, out_indices, **kwargs)
            self.names = [f"res{stride.bit_length() - 1}" for stride in self.maps.strides]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return dict(zip(self.names, self.maps(x)))

        @property
        def size_divisibility(self) -> int:
            """detectron2's FPN doubles its maps, so sides must be multiples of the coarsest stride."""
            return self.maps.strides[-1]

        def output_shape(self) -> dict[str, Any]:
            shape = framework("detectron2.layers", _INSTALL).ShapeSpec
            return {
                name: shape(channels=channels, stride=stride)
                for name, channels, stride in zip(self.names, self.maps.channels, self.maps.strides)
            }

    return TerrazzoBackbone


def register(cfg: Any) -> None:
    """Let `cfg.MODEL.BACKBONE.NAME` be "terrazzo" or "terrazzo_fpn", with settings under `cfg.MODEL.TERRAZZO`.

        cfg = detectron2.config.get_cfg()
        register(cfg)
        cfg.MODEL.BACKBONE.NAME = "terrazzo_fpn"
        cfg.MODEL.TERRAZZO.NAME = "dinat_mini"
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]

    Raises:
        BackendError: detectron2 is not installed.
    """
    modeling = framework("detectron2.modeling", _INSTALL)
    node = framework("detectron2.config", _INSTALL).CfgNode
    cfg.MODEL.TERRAZZO = node({"NAME": "dinat_mini", "PRETRAINED": False, "DROP_PATH_RATE": 0.0})
    registry = modeling.BACKBONE_REGISTRY
    for name, build in (("terrazzo", _build), ("terrazzo_fpn", _build_with_fpn)):
        if name not in registry:
            registry._do_register(name, build)


def _build(cfg: Any, input_shape: Any) -> nn.Module:
    given = cfg.MODEL.TERRAZZO
    return backbone_class()(
        given.NAME, given.PRETRAINED, in_chans=input_shape.channels, drop_path_rate=given.DROP_PATH_RATE
    )


def _build_with_fpn(cfg: Any, input_shape: Any) -> nn.Module:
    pyramids, given = framework("detectron2.modeling.backbone.fpn", _INSTALL), cfg.MODEL.FPN
    return pyramids.FPN(
        bottom_up=_build(cfg, input_shape),
        in_features=given.IN_FEATURES,
        out_channels=given.OUT_CHANNELS,
        norm=given.NORM,
        top_block=pyramids.LastLevelMaxPool(),
        fuse_type=given.FUSE_TYPE,
    )

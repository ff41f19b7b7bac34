"""Maps of stride 4, 8, 16 and 32 from the last map of a plain backbone, inside the timm model."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import nn

from terrazzo.backbones._checks import whole
from terrazzo.backbones._names import check_name
from terrazzo.errors import InputError

STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def level(channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """The map at another scale, then a 1x1 and a 3x3 convolution, each with a norm and without a bias.

    Args:
        scale: 4, 2 or 1, or 1 over a whole number.

    Source: ViTDet, arXiv 2203.16527, section 3 and appendix A.2.
    """
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
        resized = [nn.MaxPool2d(round(1 / scale), ceil_mode=True)] if scale < 1 else []
    return nn.Sequential(
        *resized,
        nn.Conv2d(quarter, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


class FeaturePyramid(FeatureGetterNet):
    """timm's wrapper for features, with ViTDet's simple feature pyramid: every level is made from the last map.

    It takes an image to maps B C H W with H = ceil(height / stride), finest first. It is a feature class of timm:
    `features_only=True, feature_cls=FeaturePyramid` works with every plain ViT of timm, too.

    Attributes:
        feature_info: The four levels.
        levels: The layers of each level that is returned, by its number: "0" is the level of stride 4.
    """

    def __init__(
        self, model: nn.Module, out_indices: int | Sequence[int] = (0, 1, 2, 3), channels: int = CHANNELS, **kwargs: Any
    ):
        """Args:
        model: A backbone with one stride.
        out_indices: The levels that are returned; the last n if an int.
        channels: Channels of each level.
        **kwargs: Further options of timm's wrapper: `norm` applies the model's last norm to the map.

        Raises:
            InputError: The model has several strides, or its stride is neither 8 nor 16.
        """
        info = getattr(model, "feature_info", None)
        reductions = {entry["reduction"] for entry in getattr(info, "info", info) or ()}
        kind = type(model).__name__
        if not hasattr(model, "forward_intermediates") or len(reductions) != 1:
            raise InputError(
                f"a pyramid is made for a plain backbone with one stride, and {kind} has {sorted(reductions) or 'none'}"
            )
        (stride,) = reductions
        if stride not in (8, 16):
            raise InputError(
                f"a pyramid of strides 4, 8, 16 and 32 needs a stride of 8 or 16, and {kind} has {stride}: "
                "create the model with patch_size=16, which timm fits pretrained weights to"
            )
        super().__init__(model, out_indices=1, **kwargs)
        (self.tap,) = cast(tuple[int, ...], self.out_indices)
        width = self.feature_info.channels()[-1]
        self.out_indices, _ = feature_take_indices(len(STRIDES), out_indices)
        channels = whole("channels", channels)
        info = [dict(num_chs=channels, reduction=s, module=f"levels.{i}") for i, s in enumerate(STRIDES)]
        self.feature_info = FeatureInfo(info, self.out_indices)
        like = next(model.parameters())
        self.levels = nn.ModuleDict({str(i): level(width, channels, stride / STRIDES[i]) for i in self.out_indices})
        self.levels.to(like.device, like.dtype)
        self.pretrained_cfg = self.default_cfg = getattr(model, "pretrained_cfg", None)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps B C H W, finest first, of images B in_chans height width."""
        (last,) = self.model.forward_intermediates(
            x, indices=[self.tap], norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        maps = []
        for i, layers in self.levels.items():
            height, width = (-(-side // STRIDES[int(i)]) for side in x.shape[2:])
            maps.append(layers(last)[:, :, :height, :width])  # a patch may reach beyond the image
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint the blocks of the backbone."""
        self.model.set_grad_checkpointing(enable)


def plain_options(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a pyramid from the arguments of a plain model.

    Args:
        name: The model's name.
        kwargs: The arguments of the model. `pyramid`, `pyramid_channels` and `output_stride` are removed.

    Returns:
        Options of timm's wrapper for features; empty without a pyramid.

    Raises:
        InputError: An option does not fit.
    """
    pyramid, channels = kwargs.pop("pyramid", False), kwargs.pop("pyramid_channels", CHANNELS)
    if "output_stride" in kwargs and not (pyramid and kwargs.pop("output_stride") == STRIDES[-1]):
        raise InputError(
            f"output_stride is an argument of models with several strides, and {name} has one stride: leave it out"
        )
    if not pyramid:
        return {}
    if not kwargs.get("features_only"):
        raise InputError(
            f"pyramid={pyramid!r} makes feature maps: pass features_only=True, too; a detector of OpenMMLab takes the "
            "neck SimpleFeaturePyramid instead"
        )
    return dict(feature_cls=FeaturePyramid, channels=channels)


def feature_pyramid(
    model: nn.Module, channels: int = CHANNELS, out_indices: int | Sequence[int] = (0, 1, 2, 3), norm: bool = False
) -> FeaturePyramid:
    """Make maps of stride 4, 8, 16 and 32 from a plain backbone, pretrained or not, with ViTDet's simple pyramid.

        vit = timm.create_model("vit_small_patch16_dinov3", pretrained=True)
        model = terrazzo.feature_pyramid(vit)
        maps = model(torch.randn(1, 3, 512, 512))  # four maps of 256 channels

    The model loses its head, as in timm's `features_only=True`.

    Args:
        model: A plain model of terrazzo or of timm with a stride of 8 or 16, also one that `terrazzo.reduce` or
            `terrazzo.convert_attention` changed.
        channels: Channels of each map.
        out_indices: The maps that are returned: 0 is the map of stride 4.
        norm: Apply the model's last norm before the pyramid.

    Raises:
        InputError: The model has several strides, or its stride is neither 8 nor 16.
    """
    return FeaturePyramid(model, out_indices, channels, norm=norm)


def register_pyramid(name: str, channels: int = CHANNELS, **arguments: Any) -> str:
    """Register a plain model with timm under a name of its own, under which its features are a pyramid.

    Frameworks that build a timm model from its name alone take this name: segmentation_models_pytorch, transformers'
    detectors, effdet.

        name = terrazzo.register_pyramid("roma_small")  # "roma_small_pyramid"
        model = segmentation_models_pytorch.Unet(f"tu-{name}", encoder_weights=None)

    Args:
        name: A plain model of terrazzo or of timm.
        channels: Channels of each map.
        **arguments: Arguments of the model; a user's arguments replace them.

    Returns:
        The new name: `name` and "_pyramid".

    Raises:
        InputError: timm knows no such model.
    """
    check_name(name)
    new = f"{name.split('.', 1)[0]}_pyramid"

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {**arguments, **{key: value for key, value in kwargs.items() if value is not None}}
        features, levels = kwargs.pop("features_only", False), kwargs.pop("out_indices", (0, 1, 2, 3))
        if not features:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        model = timm.create_model(name, pretrained=pretrained, **{**kwargs, "num_classes": 0})
        return feature_pyramid(model, channels, levels)

    entrypoint.__name__ = entrypoint.__qualname__ = new
    entrypoint.__doc__ = f"{name}; its features are a pyramid."
    setattr(sys.modules[__name__], new, entrypoint)
    register_model(entrypoint)
    return new

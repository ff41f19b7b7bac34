"""Backbones for any mixer of `terrazzo.mixers()`: a plain ViT, and a pyramid with a mixer for each stage.

They are terrazzo's own, for training a mechanism from scratch and for comparing mechanisms in one architecture; nobody
published weights. The plain ViT is DeiT (arXiv 2012.12877) with another attention. The pyramid has stages like PVT
(arXiv 2102.12122) of timm's blocks. A depthwise convolution in front of each block encodes positions (CPVT, arXiv
2102.10882), so the pyramid has no positions to resize.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Block
from torch import nn

from terrazzo.backbones._convert import check_together
from terrazzo.backbones._deit import SMALL, TINY, DeiT, from_official
from terrazzo.backbones._hosted import hosted
from terrazzo.backbones._layers import ConvDownsampler, init_linear, on_maps
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._tokens import Reducer
from terrazzo.backbones._weights import any_prefix
from terrazzo.backbones.mixers import Host, Mixer, create_mixer
from terrazzo.errors import InputError

__all__ = ["MixerPyramid", "MixerViT"]

_norm_layer = partial(LayerNorm, eps=1e-6)


class MixerViT(DeiT):
    """DeiT with a mixer in each block."""

    def __init__(
        self,
        mixer: str = "llsa",
        mixer_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        mixer: One of `terrazzo.mixers()`.
        mixer_options: Options of the mixer: see the classes in `terrazzo.backbones.mixers`.
        **kwargs: See `DeiT`.

        Raises:
            InputError: No mixer has this name, an option is not valid, or the mixer does not fit `window`.
        """
        factory = dict(device=device, dtype=dtype)
        super().__init__(Reducer(), **factory, **kwargs)
        for i, block in enumerate(self.blocks):
            block.attn.mixer = _mixer(block, mixer, mixer_options, i, self.depth, **factory)
        check_together(self, self.reducer)


def _mixer(
    block: nn.Module, name: str, options: Mapping[str, Any] | None, layer: int, depth: int, **factory: Any
) -> Mixer | None:
    """The mixer of a block's attention; None for "softmax", which timm's attention computes itself.

    It is made after the initialisation of the model, because mixers initialise their own parameters.
    """
    if not isinstance(options, Mapping | None):
        raise InputError(f"a mixer's options must be a dict of names and values, got {options!r}")
    attn = block.attn
    host = Host(attn.num_heads * attn.head_dim, attn.num_heads, attn.head_dim, layer, depth)
    mixer = create_mixer(name, host, **factory, **(options or {}))
    return None if name == "softmax" else mixer


class PlacedBlock(nn.Module):
    """A depthwise convolution as position encoding, then timm's block, which may have a mixer, on (B, H, W, C)."""

    def __init__(self, block: nn.Module, dim: int, **factory: Any):
        """Args:
        block: timm's block; it becomes a host (`terrazzo.backbones._hosted`).
        """
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.block = hosted(block)
        self.reducer = Reducer()  # reduces nothing, and tells the block where its tokens stand

    def forward(self, x: torch.Tensor, state: None = None) -> torch.Tensor:
        x = x + on_maps(x, self.position)
        grid = tuple(x.shape[1:3])
        tokens = self.block(x.flatten(1, 2), self.reducer.begin(grid, prefix=0, depth=0, maps=False))
        return tokens.unflatten(1, grid)


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm, with GELU in between: image to (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int, **factory: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, bias=False, **factory)
        self.norm1 = nn.BatchNorm2d(dim // 2, **factory)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, bias=False, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)).permute(0, 2, 3, 1)


class MixerPyramid(Pyramid):
    """Stages of blocks, each stage with its own mixer and twice the channels of the stage before."""

    dilates = True

    def __init__(
        self,
        mixers: Sequence[str] = ("llsa", "llsa", "softmax", "softmax"),
        mixer_options: Sequence[Mapping[str, Any] | None] | None = None,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        mixers: One of `terrazzo.mixers()` for each stage.
        mixer_options: The options of each stage's mixer; None for no options.
        dim: Channels of the first stage.
        depths: Blocks of each stage.
        head_dim: Channels of a head.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.

        Raises:
            InputError: There is not one mixer for each stage, a mixer or an option is not valid, or heads do not divide
                channels.
        """
        mixer_options = [None] * len(depths) if mixer_options is None else mixer_options
        for what, given in (("mixers", mixers), ("mixer_options", mixer_options)):
            if isinstance(given, str | Mapping) or len(given) != len(depths):
                raise InputError(f"{what} must have one entry for each of the {len(depths)} stages, got {given!r}")
        if dim % head_dim:
            raise InputError(f"dim must be a multiple of head_dim, {head_dim}, got {dim}")
        factory = dict(device=device, dtype=dtype)
        widths = [dim * 2**i for i in range(len(depths))]
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            heads = widths[i] // head_dim
            made = dict(qkv_bias=True, norm_layer=_norm_layer, **factory)
            blocks = [PlacedBlock(Block(widths[i], heads, drop_path=r, **made), widths[i], **factory) for r in rates]
            stages.append(Stage(blocks, ConvDownsampler(widths[i - 1], **factory) if i else None))
        stem = ConvStem(in_chans, dim, **factory)
        super().__init__(stem, stages, widths, norm_layer=_norm_layer, in_chans=in_chans, **factory, **kwargs)
        self.apply(init_linear)
        layer = 0
        for stage, name, options in zip(self.stages, mixers, mixer_options):
            for placed in stage.blocks:
                placed.block.attn.mixer = _mixer(placed.block, name, options, layer, sum(depths), **factory)
                layer += 1


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn a checkpoint of DeiT, of a plain ViT of timm, or of these models into a state dict of `model`."""
    return from_official(state_dict, model) if isinstance(model, MixerViT) else state_dict


_NO_TOP1 = "none: an architecture of terrazzo's own, without weights"

_DEIT = imagenet_cfg(
    _NO_TOP1,
    pool_size=(14, 14),
    first_conv="stem.patches",
    origin_url="https://github.com/facebookresearch/deit",
    paper_name="Training data-efficient image transformers & distillation through attention",
    paper_ids="arXiv:2012.12877",
)

_PYRAMID = imagenet_cfg(
    _NO_TOP1,
    first_conv="stem.conv1",
    origin_url="https://arxiv.org/abs/2102.12122",
    paper_name="Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
    paper_ids="arXiv:2102.12122",
)

default_cfgs = generate_default_cfgs(
    {"mixer_vit_tiny": dict(_DEIT), "mixer_vit_small": dict(_DEIT), "mixer_pyramid_tiny": _PYRAMID}
)


def _quarters(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The last block of each quarter, each block once."""
    depth = arguments.get("depth", 12)
    return tuple(sorted({-(-depth * i // 4) - 1 for i in (1, 2, 3, 4)}))


register_variants(__name__, MixerViT, {"mixer_vit_tiny": TINY, "mixer_vit_small": SMALL}, out_indices=_quarters)
register_variants(
    __name__,
    MixerPyramid,
    {"mixer_pyramid_tiny": dict(mixers=("llsa", "llsa", "softmax", "softmax"), dim=64, depths=(2, 2, 6, 2))},
)

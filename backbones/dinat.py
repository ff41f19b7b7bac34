"""NAT, DiNAT, DiNAT_s and the isotropic NAT and DiNAT.

Papers:
    Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143.
    Dilated Neighborhood Attention Transformer, 2022, arXiv 2209.15001.
Official code: github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT licence; weights by the authors.

Where paper and code disagree, this follows the code: the bias is added outside of the scaling, and `dinat_small` has no
layer scale although `nat_small` has. A map smaller than kernel x dilation is zero-padded at the bottom and right before
the projection, as with natten 0.14, the operator that the published weights were trained and evaluated with; later
natten versions refuse these maps.

Deviations without effect on outputs: a downsampler opens its stage instead of closing the stage before, the isotropic
models take any input size, and rpb has no weight decay (the authors intended this, too, but their classification recipe
requests it under a name that timm does not read).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._layers import ConvDownsampler, PatchEmbed, PatchMerging, init_linear, trunc_normal_
from terrazzo.backbones._plain import Plain
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._weights import any_prefix, rename, resize_bias_tables
from terrazzo.errors import InputError
from terrazzo.kernels import neighborhood_attention

__all__ = ["NAT", "IsotropicNAT"]


class NeighborhoodAttention(nn.Module):
    """Multi-head (dilated) neighborhood attention with relative position bias on (B, H, W, C), any H and W."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, proj_drop: float = 0.0, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, **factory))
        trunc_normal_(self.rpb, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        window = self.kernel_size * self.dilation
        if height < window or width < window:
            x = F.pad(x, (0, 0, 0, max(0, window - width), 0, max(0, window - height)))
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # B H W 3 heads D
        x = neighborhood_attention(*qkv.unbind(3), self.kernel_size, self.dilation, self.rpb)
        x = x.flatten(-2)[:, :height, :width]
        return self.proj_drop(self.proj(x))

    def dilate(self, before: int, after: int) -> None:
        self.dilation *= after


class NATBlock(nn.Module):
    """Pre-norm attention and MLP, each with an optional per-channel layer scale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        **factory,
    ):
        super().__init__()
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **factory))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **factory))
        else:
            self.gamma1 = self.gamma2 = None
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        for gamma, norm, mix in ((self.gamma1, self.norm1, self.attn), (self.gamma2, self.norm2, self.mlp)):
            update = self.update(x, norm, mix)
            x = x + self.drop_path(update if gamma is None else gamma * update)
        return x

    def update(self, x: torch.Tensor, norm: nn.Module, mix: nn.Module) -> torch.Tensor:
        """What attention or the MLP adds to a map, before scales."""
        return mix(norm(x))


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then a norm: (B, C, H, W) to (B, H/4, W/4, D)."""

    def __init__(self, in_chans: int, dim: int, **factory):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory),
        )
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class NAT(Pyramid):
    """NAT, DiNAT and DiNAT_s: four stages of neighborhood attention blocks with head dimension 32.

    Source: arXiv 2204.07143, section 3.3 and table 2; arXiv 2209.15001, section 4 and tables 1 and 2.
    """

    no_decay = ("rpb",)
    dilates = True

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        patches: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        embed_dim: Channels of the first stage; each later stage has twice as many as the stage before.
        depths, num_heads: Per stage.
        dilations: Per stage and block; None for 1 everywhere (NAT). Dilation is a property of a checkpoint: a model
            trained at 8, 4, 2, 1 loses 4.5 points of top-1 when tested at 1 (arXiv 2209.15001).
        layer_scale: Initial value of the per-channel scales; None for no scales.
        patches: DiNAT_s: non-overlapping patches and Swin's merging instead of convolutions.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.

        Raises:
            InputError: `dilations` does not hold one number per block.
        """
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if [len(stage) for stage in dilations] != list(depths):
            raise InputError(
                f"dilations must hold one number per block: {list(depths)} per stage, "
                f"got {[len(stage) for stage in dilations]}"
            )
        factory = dict(device=device, dtype=dtype)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(channels):
            downsample = None
            if i > 0:
                downsample = (PatchMerging if patches else ConvDownsampler)(channels[i - 1], **factory)
            blocks = [
                NATBlock(dim, num_heads[i], kernel_size, dilation, mlp_ratio, layer_scale, rate, **factory)
                for dilation, rate in zip(dilations[i], rates[i])
            ]
            stages.append(Stage(blocks, downsample))
        stem = (
            PatchEmbed(in_chans, embed_dim, 4, **factory) if patches else ConvTokenizer(in_chans, embed_dim, **factory)
        )
        super().__init__(stem, stages, channels, norm_layer=nn.LayerNorm, in_chans=in_chans, **factory, **kwargs)
        self.apply(init_linear)


class IsotropicNAT(Plain):
    """Isotropic NAT and DiNAT: a ViT whose blocks attend to neighborhoods, on patches of 16 pixels.

    Source: arXiv 2209.15001, section 4.4 (table 9).
    """

    no_decay = ("rpb",)

    def __init__(
        self,
        embed_dim: int = 384,
        num_heads: int = 12,
        kernel_size: int = 7,
        dilations: Sequence[int] = (1,) * 12,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        dilations: One dilation per block; their number is the depth.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, len(dilations))
        blocks = [
            NATBlock(embed_dim, num_heads, kernel_size, dilation, mlp_ratio, None, rate, **factory)
            for dilation, rate in zip(dilations, rates)
        ]
        stem = PatchEmbed(in_chans, embed_dim, 16, **factory)
        super().__init__(stem, blocks, embed_dim, 16, norm_layer=nn.LayerNorm, in_chans=in_chans, **factory, **kwargs)
        self.apply(init_linear)


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^(?:levels|layers)\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"^layers\.(\d+)\.(?=norm|attn|mlp)", r"blocks.\1."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]
# From the names of the copies on the Hugging Face hub (transformers' NAT and DiNAT) to the authors'.
HUB_NAMES = [
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    *((rf"^hidden_states_norms\.stage{i + 1}\.", f"norm{i}.") for i in range(4)),
]


def _from_hub(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a hub copy to the authors' form: query, key and value in one matrix, two separate layer scales."""
    out = {}
    state_dict = rename(state_dict, HUB_NAMES)
    for name, value in state_dict.items():
        if found := re.fullmatch(r"(.*)\.attention\.self\.query\.(weight|bias)", name):
            parts = (name.replace(".query.", f".{part}.") for part in ("query", "key", "value"))
            out[f"{found[1]}.attn.qkv.{found[2]}"] = torch.cat([state_dict[part] for part in parts])
        elif re.search(r"\.attention\.self\.(key|value)\.", name):
            continue
        elif name.endswith(".layer_scale_parameters"):
            block = name.rsplit(".", 1)[0]
            out[f"{block}.gamma1"], out[f"{block}.gamma2"] = value
        else:
            out[name] = value
    return out


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`.

    Takes the authors' classifiers, their detectors' and segmentors' backbones (`backbone.` prefix, `norm0`..`norm3`:
    build the model with `norm_outputs=True`) and the hub's copies; a bias table of another kernel size is resized.
    """
    if any(".attention.self." in name for name in state_dict):
        state_dict = _from_hub(state_dict)
    return resize_bias_tables(rename(state_dict, OFFICIAL_NAMES), model, suffix=".rpb")


def _cfg(url: str, top1: float | None, **kwargs) -> dict[str, Any]:
    about = dict(
        first_conv="stem.proj.0",
        license="mit",
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        paper_name="Dilated Neighborhood Attention Transformer",
        paper_ids="arXiv:2209.15001",
    )
    return imagenet_cfg(top1, url=f"https://shi-labs.com/projects/{url}", **{**about, **kwargs})


_NAT = dict(paper_name="Neighborhood Attention Transformer", paper_ids="arXiv:2204.07143")
_PATCHES = dict(first_conv="stem.proj")
_LARGE = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
_22K = dict(num_classes=21841)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg("nat/checkpoints/CLS/nat_mini.pth", 81.8, **_NAT),
        "nat_tiny.in1k": _cfg("nat/checkpoints/CLS/nat_tiny.pth", 83.2, **_NAT),
        "nat_small.in1k": _cfg("nat/checkpoints/CLS/nat_small.pth", 83.7, **_NAT),
        "nat_base.in1k": _cfg("nat/checkpoints/CLS/nat_base.pth", 84.3, **_NAT),
        "dinat_mini.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth", 81.8),
        "dinat_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth", 82.7),
        "dinat_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth", 83.8),
        "dinat_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth", 84.4),
        "dinat_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth", 86.6),
        "dinat_large.in22k": _cfg("dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", None, **_22K),
        "dinat_large_384.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth", 87.4, **_LARGE
        ),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", 87.5, **_LARGE
        ),
        "dinat_large_384_11x11.in22k_interpolated": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", None, **_22K
        ),
        "dinat_s_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth", 81.8, **_PATCHES),
        "dinat_s_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth", 83.5, **_PATCHES),
        "dinat_s_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth", 83.8, **_PATCHES),
        "dinat_s_large.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth", 86.5, **_PATCHES
        ),
        "dinat_s_large.in22k": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth", None, **_PATCHES, **_22K
        ),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth", 87.4, **_PATCHES, **_LARGE
        ),
        **{
            f"{family}_isotropic_{size}.in1k": _cfg(
                f"dinat/checkpoints/isotropic/{family}_isotropic_{size}_in1k_224.pth",
                top1,
                pool_size=(14, 14),
                **_PATCHES,
            )
            for family, size, top1 in (
                ("nat", "small", 80.0),
                ("nat", "base", 81.6),
                ("dinat", "small", 80.8),
                ("dinat", "base", 82.1),
            )
        },
    }
)

# Dilations at 224 (and at 384 with kernel 11): the largest that fit the nominal maps (arXiv 2209.15001, table 12).
_AT_224 = {
    (3, 4, 6, 5): [[1, 8, 1], [1, 4] * 2, [1, 2] * 3, [1] * 5],
    (3, 4, 18, 5): [[1, 8, 1], [1, 4] * 2, [1, 2] * 9, [1] * 5],
    (2, 2, 6, 2): [[1, 8], [1, 4], [1, 2] * 3, [1] * 2],
    (2, 2, 18, 2): [[1, 8], [1, 4], [1, 2] * 9, [1] * 2],
}
_MINI = dict(depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3)
_TINY = dict(depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3)
_SMALL = dict(depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=2)
_BASE = dict(depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), embed_dim=128, mlp_ratio=2, layer_scale=1e-5)
_LARGE_ARGS = dict(depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), embed_dim=192, mlp_ratio=2)
_S = dict(mlp_ratio=4, patches=True)
_S_TINY = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), embed_dim=96, **_S)
_S_SMALL = dict(depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), embed_dim=96, **_S)
_S_BASE = dict(depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), embed_dim=128, **_S)
_S_LARGE = dict(depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), embed_dim=192, **_S)
_ISOTROPIC_SMALL = dict(embed_dim=384, num_heads=12)
_ISOTROPIC_BASE = dict(embed_dim=768, num_heads=24)


def _dilated(arguments: dict[str, Any]) -> dict[str, Any]:
    return dict(arguments, dilations=_AT_224[arguments["depths"]])


register_variants(
    __name__,
    NAT,
    {
        "nat_mini": _MINI,
        "nat_tiny": _TINY,
        "nat_small": dict(_SMALL, layer_scale=1e-5),
        "nat_base": _BASE,
        "dinat_mini": _dilated(_MINI),
        "dinat_tiny": _dilated(_TINY),
        "dinat_small": _dilated(_SMALL),
        "dinat_base": _dilated(_BASE),
        "dinat_large": _dilated(_LARGE_ARGS),
        "dinat_large_384": dict(_LARGE_ARGS, dilations=[[1, 13, 1], [1, 6] * 2, [1, 3] * 9, [1] * 5]),
        "dinat_large_384_11x11": dict(_dilated(_LARGE_ARGS), kernel_size=11),
        "dinat_s_tiny": _dilated(_S_TINY),
        "dinat_s_small": _dilated(_S_SMALL),
        "dinat_s_base": _dilated(_S_BASE),
        "dinat_s_large": _dilated(_S_LARGE),
        "dinat_s_large_384": dict(_S_LARGE, dilations=[[1, 13], [1, 6], [1, 3] * 9, [1] * 2]),
    },
)
register_variants(
    __name__,
    IsotropicNAT,
    {
        "nat_isotropic_small": _ISOTROPIC_SMALL,
        "nat_isotropic_base": _ISOTROPIC_BASE,
        "dinat_isotropic_small": dict(_ISOTROPIC_SMALL, dilations=(1, 2) * 6),
        "dinat_isotropic_base": dict(_ISOTROPIC_BASE, dilations=(1, 2) * 6),
    },
    out_indices=(3, 7, 11),
)

"""VMamba: blocks of four selective scans over the map (SS2D) and an MLP, in four stages; and its first version.

Paper: VMamba: Visual State Space Model, NeurIPS 2024, arXiv 2401.10166.
Official code: github.com/MzeroMiko/VMamba, MIT licence; weights by the authors.

The names come from the authors' tables: sXlY has X scanned channels per channel and Y blocks in the third stage; v0 is
the version of January 2024, gated, with 16 states and without MLPs. The main models of the paper are
`vmamba_tiny_s1l8`, `vmamba_small_s2l15` and `vmamba_base_s2l15`.

Deviations without effect on outputs: maps are channels-last throughout, a downsampler opens its stage instead of
closing the stage before, projections for all four scans are computed at once in the order of the image, and drop path
is 0 by default. Deviation with an effect: v0 pads images to a multiple of 4; the authors' patch embedding drops the
rest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._layers import ConvDownsampler, PatchEmbed, PatchMerging, init_linear, on_maps
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._ss2d import SS2D
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, flatten_pointwise, rename

__all__ = ["VMamba"]


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a norm, GELU between them: (B, C, H, W) to (B, H/4, W/4, D)."""

    def __init__(self, in_chans: int, dim: int, **factory):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(dim // 2, **factory)
        self.act = nn.GELU()
        self.proj2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.proj(x).permute(0, 2, 3, 1)))
        return self.norm2(on_maps(x, self.proj2))


class VSSBlock(nn.Module):
    """Pre-norm SS2D, and a pre-norm MLP except in the first version, on (B, H, W, C)."""

    def __init__(self, dim: int, ratio: float, states: int, first_version: bool, drop_path: float, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.op = SS2D(dim, ratio, states, gated=first_version, **factory)
        self.norm2 = self.mlp = None
        if not first_version:
            self.norm2 = nn.LayerNorm(dim, **factory)
            self.mlp = Mlp(dim, 4 * dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = x + self.drop_path(self.scanned(x))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def scanned(self, x: torch.Tensor) -> torch.Tensor:
        """What SS2D adds to a map."""
        return self.op(self.norm(x))


class VMamba(Pyramid):
    """Four stages of SS2D blocks. Source: arXiv 2401.10166, section 4 and the table of architectures."""

    no_decay = SS2D.no_decay
    dilates = True

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        ratio: float = 1.0,
        states: int = 1,
        first_version: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        embed_dim: Channels of the first stage; each later stage has twice as many as the stage before.
        depths: Blocks per stage.
        ratio: Scanned channels per channel of the map.
        states: Numbers of state per scanned channel.
        first_version: v0: patches, Swin's merging and gated SS2D, no MLPs.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(channels):
            downsample = None
            if i > 0 and first_version:
                downsample = PatchMerging(dim // 2, **factory)
            elif i > 0:
                downsample = ConvDownsampler(dim // 2, bias=True, **factory)
            blocks = [VSSBlock(dim, ratio, states, first_version, rate, **factory) for rate in rates[i]]
            stages.append(Stage(blocks, downsample))
        if first_version:
            stem = PatchEmbed(in_chans, embed_dim, 4, **factory)
        else:
            stem = Stem(in_chans, embed_dim, **factory)
        super().__init__(stem, stages, channels, norm_layer=nn.LayerNorm, in_chans=in_chans, **factory, **kwargs)
        self.apply(init_linear)


# From the authors' names to ours, including their different names in the first version.
OFFICIAL_NAMES = [
    (r"^patch_embed\.0\.", "patch_embed.proj."),
    (r"^patch_embed\.2\.", "patch_embed.norm."),
    (r"^patch_embed\.5\.", "patch_embed.proj2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"\.downsample\.1\.", ".downsample.reduction."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    LAST_PROJECTION,
    (r"^outnorm(\d)\.", r"norm\1."),
    (r"^classifier\.norm\.", "norm."),
    (r"^(?:classifier\.)?head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`.

    It takes the authors' classifiers, with projections as matrices or as 1x1 convolutions, and their detectors' and
    segmentors' backbones (`backbone.` prefix, `outnorm0`..`outnorm3`: build the model with `norm_outputs=True`).
    """
    return flatten_pointwise(rename(state_dict, OFFICIAL_NAMES), model)


def _cfg(file: str, top1: float) -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        url=f"https://github.com/MzeroMiko/VMamba/releases/download/%23{file}",
        first_conv="stem.proj",
        license="mit",
        origin_url="https://github.com/MzeroMiko/VMamba",
        paper_name="VMamba: Visual State Space Model",
        paper_ids="arXiv:2401.10166",
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.in1k": _cfg("v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
        "vmamba_tiny_s2l5.in1k": _cfg("v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
        "vmamba_small_s2l15.in1k": _cfg("v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6),
        "vmamba_small_s1l20.in1k": _cfg("v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
        "vmamba_base_s2l15.in1k": _cfg("v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9),
        "vmamba_base_s1l20.in1k": _cfg("v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
        "vmamba_v0_tiny.in1k": _cfg("v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 82.2),
        "vmamba_v0_small.in1k": _cfg("v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
        "vmamba_v0_base.in1k": _cfg("v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
    }
)

_V0 = dict(ratio=2.0, states=16, first_version=True)

register_variants(
    __name__,
    VMamba,
    {
        "vmamba_tiny_s1l8": dict(depths=(2, 2, 8, 2)),
        "vmamba_tiny_s2l5": dict(depths=(2, 2, 5, 2), ratio=2.0),
        "vmamba_small_s2l15": dict(depths=(2, 2, 15, 2), ratio=2.0),
        "vmamba_small_s1l20": dict(depths=(2, 2, 20, 2)),
        "vmamba_base_s2l15": dict(embed_dim=128, depths=(2, 2, 15, 2), ratio=2.0),
        "vmamba_base_s1l20": dict(embed_dim=128, depths=(2, 2, 20, 2)),
        "vmamba_v0_tiny": dict(depths=(2, 2, 9, 2), **_V0),
        "vmamba_v0_small": dict(depths=(2, 2, 27, 2), **_V0),
        "vmamba_v0_base": dict(embed_dim=128, depths=(2, 2, 27, 2), **_V0),
    },
)

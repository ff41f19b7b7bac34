"""MedMamba: half of a block's channels pass convolutions, half pass four selective scans over the map (SS2D).

Paper: MedMamba: Vision Mamba for Medical Image Classification, 2024, arXiv 2403.03849.
Official code: github.com/YubiaoYue/MedMamba, without a licence; weights by the authors, for medical data sets, in one
shared folder that asks for a password. There are no ImageNet weights.

Paper and code disagree, and both versions are here. The paper publishes the sizes of S and B with 12 and 16 blocks in
the third stage, `medmamba_s_paper` and `medmamba_b_paper`; the authors' script builds 8 and 12, `medmamba_s` and
`medmamba_b`. A checkpoint of the wrong depth is refused; the error names the model that takes it.

Deviations without effect on outputs: maps are channels-last throughout, a downsampler opens its stage instead of
closing the stage before, drop path is 0 by default (0.1 in the authors' code). Deviation with an effect: a map that
does not divide into patches is zero-padded at the right and bottom, as in VMamba, so features have
ceil(size / stride) pixels; the authors' code drops the last row and column. At multiples of 32 both are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._layers import PatchEmbed, PatchMerging, init_linear, on_maps
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._ss2d import SS2D
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, rename
from terrazzo.errors import InputError

__all__ = ["MedMamba"]


def _convolutions(dim: int, **factory) -> nn.Sequential:
    """Batch norm, two 3x3 and one 1x1 convolution, with batch norm and ReLU between them, and a final ReLU."""
    return nn.Sequential(
        nn.BatchNorm2d(dim, **factory),
        nn.Conv2d(dim, dim, 3, padding=1, **factory),
        nn.BatchNorm2d(dim, **factory),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 3, padding=1, **factory),
        nn.BatchNorm2d(dim, **factory),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 1, **factory),
        nn.ReLU(),
    )


class SSConvSSMBlock(nn.Module):
    """Convolutions on the first half of the channels of (B, H, W, C), SS2D on the second half, then a channel shuffle.

    Channels 2i of the result come from the convolutions, channels 2i + 1 from SS2D; the result is added to the map.
    Stochastic depth drops only SS2D.
    """

    def __init__(self, dim: int, states: int, drop_path: float, **factory):
        super().__init__()
        self.conv = _convolutions(dim // 2, **factory)
        self.norm = nn.LayerNorm(dim // 2, **factory)
        self.op = SS2D(dim // 2, 2.0, states, gated=True, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        left = on_maps(left.contiguous(), *self.conv)
        right = self.drop_path(self.op(self.norm(right)))
        return x + torch.stack((left, right), -1).flatten(-2)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class MedMamba(Pyramid):
    """Four stages of SS-Conv-SSM blocks. Sources: arXiv 2403.03849, section 3, and the authors' code."""

    no_decay = SS2D.no_decay
    dilates = True

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        states: int = 16,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        embed_dim: Channels of the first stage; each later stage has twice as many as the stage before.
        depths: Blocks per stage.
        states: Numbers of state per scanned channel.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`. The authors have no output norms.
        """
        factory = dict(device=device, dtype=dtype)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                [SSConvSSMBlock(dim, states, rate, **factory) for rate in rates[i]],
                PatchMerging(dim // 2, **factory) if i > 0 else None,
            )
            for i, dim in enumerate(channels)
        ]
        stem = PatchEmbed(in_chans, embed_dim, 4, **factory)
        super().__init__(stem, stages, channels, norm_layer=nn.LayerNorm, in_chans=in_chans, **factory, **kwargs)
        self.norm = nn.Identity()  # the head takes the map without a norm
        self.apply(_init_weights)


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    LAST_PROJECTION,
    (r"\.conv33conv33conv11\.", ".conv."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`.

    Raises:
        InputError: The checkpoint has another width or depth: S and B differ between the paper and the authors' script.
    """
    weights = rename(state_dict, OFFICIAL_NAMES)
    blocks = {name.split(".")[3] for name in weights if name.startswith("stages.2.blocks.")}
    if blocks and "stem.norm.weight" in weights and len(model.stages) > 2:
        found = (len(weights["stem.norm.weight"]), len(blocks))
        wanted = (model.feature_info[0]["num_chs"], len(model.stages[2].blocks))
        if found != wanted:
            name = next((name for name, variant in _VARIANTS.items() if variant == found), "a model of this shape")
            raise InputError(
                f"the checkpoint has {found[0]} channels and {found[1]} blocks in the third stage, "
                f"the model {wanted[0]} and {wanted[1]}: build {name}"
            )
    return weights


# The authors' readme links to this folder; it asks for a password, and timm cannot fetch its files.
_WEIGHTS = "the folder that github.com/YubiaoYue/MedMamba links to, which asks for a password"

# Channels of the first stage, and blocks of the third stage.
_VARIANTS = {
    "medmamba_t": (96, 4),
    "medmamba_s": (96, 8),
    "medmamba_s_paper": (96, 12),
    "medmamba_b": (128, 12),
    "medmamba_b_paper": (128, 16),
}

default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(
            "none on ImageNet",
            crop_pct=1.0,
            crop_mode="squash",
            interpolation="bilinear",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            first_conv="stem.proj",
            license="unstated",
            origin_url="https://github.com/YubiaoYue/MedMamba",
            paper_name="MedMamba: Vision Mamba for Medical Image Classification",
            paper_ids="arXiv:2403.03849",
            description=f"the authors' weights must be fetched by hand from {_WEIGHTS}",
        )
        for name in _VARIANTS
    }
)


register_variants(
    __name__,
    MedMamba,
    {name: dict(embed_dim=dim, depths=(2, 2, depth, 2)) for name, (dim, depth) in _VARIANTS.items()},
)

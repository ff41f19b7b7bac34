"""AttNet: a convolutional network with attentive convolution, which computes its 3x3 kernels from each sample's map.

Paper: Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency, 2025,
    arXiv 2510.20092.
Official code: github.com/price112/Attentive-Convolution, MIT licence; weights by the authors, in one shared folder.

Where paper and code disagree, this follows the code: the map is pooled row by row, as a sequence, not on a 3x3 grid. So
kernels depend on the map's proportions and on the padding of a batch.

Deviations without effect on outputs: the map is pooled before its projection for the kernels, not after (both are
linear). This saves a third of the mixer's pointwise multiply-adds; the authors count all of them. Drop path is 0 by
default; the rates of the authors' training runs are in the configs.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, RmsNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._bare import is_bare
from terrazzo.backbones._head import Head
from terrazzo.backbones._layers import cells, trunc_normal_
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._weights import any_prefix, rename
from terrazzo.kernels import attentive_conv
from terrazzo.kernels.dispatch.dtypes import without_autocast

__all__ = ["AttNet"]


class AttentiveConv(nn.Module):
    """Attentive convolution of (B, C, H, W) between two pointwise convolutions.

    Source: arXiv 2510.20092, sections on adaptive routing and lateral inhibition; names follow the authors' code.
    """

    def __init__(self, dim: int, kernel_size: int, **factory):
        super().__init__()
        self.taps = taps = kernel_size**2
        self.difference_control = nn.Parameter(torch.zeros(dim, **factory))
        self.kernel_proj = nn.Conv2d(dim, dim, 1, **factory)
        self.kernel_gen = nn.Linear(taps, taps, **factory)
        self.x_proj = nn.Conv2d(dim, dim, 1, **factory)
        self.proj = nn.Conv2d(dim, dim, 1, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.x_proj(x)
        if not is_bare(self.kernel_proj, self.kernel_gen):
            return self.proj(convolve(value, self.kernels(x)))
        x = attentive_conv(
            x,
            value,
            self.kernel_proj.weight.flatten(1),
            self.kernel_proj.bias,
            self.kernel_gen.weight,
            self.kernel_gen.bias,
            self.difference_control,
        )
        return self.proj(x)

    def kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The kernels of each sample and channel, (B, C, taps), from (B, C, H, W); the same as in `attentive_conv`."""
        wide = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(wide):
            pooled = wide @ cells(self.taps, wide.shape[2], wide).t()
        return self.kernels_of(pooled.to(x.dtype))

    def kernels_of(self, pooled: torch.Tensor) -> torch.Tensor:
        """The kernels (B, C, taps) from the means of the input in the cells, (B, C, taps)."""
        projected = self.kernel_proj(pooled.unsqueeze(3)).squeeze(3)
        kernels = self.kernel_gen(F.gelu(projected))
        share = self.difference_control.sigmoid().to(kernels.dtype)
        return kernels - share[:, None] * kernels.mean(2, keepdim=True)


def convolve(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution of (B, C, H, W) with separate kernels (B, C, taps) for each sample and channel.

    It sums shifted maps, because no ONNX operation has separate weights for each sample.
    """
    side = math.isqrt(kernels.shape[2])
    height, width = x.shape[2:]
    kernels, padded = kernels.to(x.dtype)[..., None, None], F.pad(x, (side // 2,) * 4)
    taps = itertools.product(range(side), repeat=2)
    parts = (padded[:, :, i : i + height, j : j + width] * kernels[:, :, i * side + j] for i, j in taps)
    return sum(parts)


class WideRmsNorm2d(RmsNorm2d):
    """timm's norm in float32 at least: gradients of small maps overflow float16 (only on a GPU, autocast widens it)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)
        return (wide * self.weight[:, None, None]).to(x.dtype)


class GatedMlp(nn.Module):
    """An MLP on (B, C, H, W) with a gate: a depthwise convolution of the first half of the hidden channels."""

    def __init__(self, dim: int, hidden: int, norm: bool, **factory):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 2 * hidden, 1, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.act = nn.GELU()
        self.norm_layer = WideRmsNorm2d(hidden, eps=1e-6, **factory) if norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.norm_layer(self.act(self.dwconv(gate)) * x))


class Block(nn.Module):
    """Pre-norm attentive convolution and gated MLP, each with an optional per-channel layer scale."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        expansion: float,
        mlp_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        **factory,
    ):
        super().__init__()
        self.token_mixer = AttentiveConv(dim, kernel_size, **factory)
        self.channel_mixer = GatedMlp(dim, int(2 * int(dim * expansion) / 3), mlp_norm, **factory)
        self.layer_scale_1, self.layer_scale_2 = (
            nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **factory) for _ in range(2)
        )
        self.norm_1, self.norm_2 = (LayerNorm2d(dim, eps=1e-6, **factory) for _ in range(2))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm_1(x))))
        return x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))


def downsampler(in_chans: int, out_chans: int, **factory) -> nn.Sequential:
    """A 3x3 convolution of stride 2 without bias, then batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False, **factory),
        nn.BatchNorm2d(out_chans, **factory),
    )


class NormedHead(Head):
    """Pooling, a norm of the pooled vector, a classifier. A map that is not pooled is not normalised."""

    def _fit(self, num_classes: int, pool_type: str, **factory) -> None:
        super()._fit(num_classes, pool_type, **factory)
        if self.global_pool.is_identity():
            self.norm = nn.Identity()  # its parameters would get no gradient
        elif getattr(getattr(self, "norm", None), "normalized_shape", ()) != (self.num_features,):
            self.norm = nn.LayerNorm(self.num_features, eps=1e-5, **factory)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.classify(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class AttNet(Pyramid):
    """AttNet: four stages of attentive convolution and gated MLPs.

    Source: arXiv 2510.20092; depths, widths and other details from the authors' models/AttNet.py.
    """

    map_fmt = "NCHW"
    no_decay = ("difference_control",)

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (32, 64, 128, 240),
        expansions: Sequence[float] = (8, 8, 4, 4),
        kernel_size: int = 3,
        mlp_norm: bool = False,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        depths, dims, expansions: Per stage; the gated MLP has two thirds of the expansion as hidden channels.
        kernel_size: Kernel size of the attentive convolution, odd.
        mlp_norm: Whether the MLP has an RMS norm of its hidden channels.
        layer_scale: Initial value of the per-channel scales; None for no scales.
        **kwargs: norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                [Block(dim, kernel_size, expansion, mlp_norm, layer_scale, rate, **factory) for rate in rates[i]],
                downsampler(dims[i - 1], dim, **factory) if i > 0 else None,
            )
            for i, (dim, expansion) in enumerate(zip(dims, expansions))
        ]
        stem = nn.Sequential(
            downsampler(in_chans, dims[0] // 2, **factory), nn.GELU(), downsampler(dims[0] // 2, dims[0], **factory)
        )
        head = dict(num_classes=num_classes, drop_rate=drop_rate)
        norm_layer = partial(LayerNorm2d, eps=1e-6)
        super().__init__(
            stem,
            stages,
            dims,
            norm_layer=norm_layer,
            in_chans=in_chans,
            global_pool=global_pool,
            **head,
            **factory,
            **kwargs,
        )
        if not self.norm_outputs:  # the norm before the classifier takes the pooled vector, not the map
            self.norm = nn.Identity()
            self.head = NormedHead(dims[-1], pool_type=global_pool, **head, **factory)
        self.apply(_init_weights)


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(?=\d)", r"stages.\1.blocks."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`."""
    return rename(state_dict, OFFICIAL_NAMES)


# The authors' readme links to this folder; timm cannot fetch its files.
_WEIGHTS = (
    "https://unioulu-my.sharepoint.com/:f:/g/personal/hayu23_univ_yo_oulu_fi/"
    "EtaWTnsh1ytNgsIYetHHwt4B1RxG_HDHN70a3NOq3fustw?e=MZ4w5w"
)


def _cfg(top1: float | str = "unknown") -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        first_conv="stem.0.0",
        license="mit",
        origin_url="https://github.com/price112/Attentive-Convolution",
        paper_name="Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        paper_ids="arXiv:2510.20092",
        description=f"the authors' weights must be fetched by hand from {_WEIGHTS}",
    )


default_cfgs = generate_default_cfgs(
    {
        "attnet_xxs.in1k": _cfg(),
        "attnet_xs.in1k": _cfg(),
        "attnet_s.in1k": _cfg(),
        "attnet_t1.in1k": _cfg(),
        "attnet_t2.in1k": _cfg(84.4),
        "attnet_t3.in1k": _cfg(),
        "attnet_t4.in1k": _cfg(),
    }
)

_T = dict(mlp_norm=True, layer_scale=1e-6)


register_variants(
    __name__,
    AttNet,
    {
        "attnet_xxs": dict(depths=(2, 2, 4, 2), dims=(32, 64, 128, 240)),
        "attnet_xs": dict(depths=(2, 2, 7, 2), dims=(40, 80, 160, 320), layer_scale=1e-6),
        "attnet_s": dict(depths=(2, 3, 10, 3), dims=(40, 80, 160, 320)),
        "attnet_t1": dict(depths=(2, 3, 12, 3), dims=(48, 96, 224, 384), **_T),
        "attnet_t2": dict(depths=(3, 3, 16, 3), dims=(64, 128, 288, 512), **_T),
        "attnet_t3": dict(depths=(4, 4, 26, 4), dims=(72, 144, 320, 576), **_T),
        "attnet_t4": dict(depths=(5, 5, 28, 5), dims=(96, 192, 384, 768), **_T),
    },
)

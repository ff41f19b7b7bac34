"""S2AFormer: strip self-attention inside hybrid perception blocks.

Paper: S2AFormer: Strip Self-Attention for Efficient Vision Transformer, IEEE TIP 2025, arXiv 2505.22195.
Official code: none was found.

This model is reconstructed from the paper; no official weights are public. The paper gives the four equations of a
block, the stem of three 3x3 convolutions, strides 4, 8, 16, 32, and the parameters and multiply-adds of the five
variants. It says that a convolution reduces keys and values in space and that 1x1 convolutions compress
queries and keys in channels. Our choices are all widths, depths, numbers of heads and ratios, the local interaction
module (XCiT's), the stem's order and the classifier's head (CMT's), one channel of queries and keys per head, norms,
activations and initialisation. They were found by counting: parameters are within 0.4 % and multiply-adds within 0.9 %
of the published values (model_cards/s2aformer.md). Other choices would match, too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._dilation import dilate
from terrazzo.backbones._head import Head
from terrazzo.backbones._layers import init_linear, on_maps, patch_conv, whole_patches
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._weights import RECONSTRUCTED
from terrazzo.kernels import strip_attention

__all__ = ["S2AFormer"]

_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class StripSelfAttention(nn.Module):
    """Global attention on (B, H, W, C) with one channel per head for queries and keys.

    Keys and values come from a map that is reduced in space.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, **factory):
        super().__init__()
        self.num_heads = num_heads
        self.reduction = reduction
        self.dilation = 1
        self.q = nn.Linear(dim, num_heads, **factory)
        self.k = nn.Linear(dim, num_heads, **factory)  # its bias shifts all scores of a query equally: no effect
        self.v = nn.Linear(dim, dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.reduce = None
        if reduction > 1:
            self.reduce = nn.Sequential()
            self.reduce.conv = patch_conv(dim, dim, reduction, groups=dim, **factory)
            self.reduce.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reduced = x
        if self.reduce is not None:
            padded = whole_patches(x.permute(0, 3, 1, 2), self.reduction, self.dilation)
            reduced = self.reduce(padded).permute(0, 2, 3, 1)
        query, key, value = (layer(y).flatten(1, 2) for layer, y in ((self.q, x), (self.k, reduced), (self.v, reduced)))
        out = strip_attention(query, key, value.unflatten(-1, (self.num_heads, -1)))  # B N heads D
        return self.proj(out.reshape(x.shape))

    def dilate(self, before: int, after: int) -> None:
        """Patches of keys and values are of the same part of the image, and take a part of its pixels."""
        self.dilation = after
        if self.reduce is not None:
            self.reduce.conv.dilation = (after, after)
            self.reduce.conv.stride = (self.reduction * after,) * 2


class LocalInteraction(nn.Module):
    """XCiT's module: two depthwise 3x3 convolutions with GELU and batch norm between them, on (B, H, W, C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim, **factory)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return on_maps(x, self.conv1, self.act, self.norm, self.conv2)


class HybridPerceptionBlock(nn.Module):
    """A depthwise convolution, strip self-attention, local interaction and an MLP, each added to its input.

    Source: arXiv 2505.22195, the four equations of the block; the last three are pre-norm.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, mlp_ratio: float, drop_path: float, **factory):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm1 = _norm_layer(dim, **factory)
        self.attn = StripSelfAttention(dim, num_heads, reduction, **factory)
        self.norm2 = _norm_layer(dim, **factory)
        self.lim = LocalInteraction(dim, **factory)
        self.norm3 = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = x + on_maps(x, self.dwconv)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.lim(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm3(x)))


class PatchEmbed(nn.Module):
    """A 2x2 convolution of stride 2, then a norm, on (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int, **factory):
        super().__init__()
        self.dilation = 1
        self.proj = patch_conv(in_dim, dim, 2, **factory)
        self.norm = _norm_layer(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = whole_patches(x.permute(0, 3, 1, 2), 2, self.dilation)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def dilate(self, before: int, after: int) -> None:
        self.dilation = before
        dilate(self.proj, before, after)


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, each followed by GELU and batch norm: image to (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int, **factory):
        super().__init__()
        for i in range(1, 4):
            conv = nn.Conv2d(in_chans if i == 1 else dim, dim, 3, stride=2 if i == 1 else 1, padding=1, **factory)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", nn.BatchNorm2d(dim, **factory))
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, 4):
            x = getattr(self, f"norm{i}")(self.act(getattr(self, f"conv{i}")(x)))
        return x.permute(0, 2, 3, 1)


class ConvHead(Head):
    """CMT's head: a 1x1 convolution, batch norm and SiLU before pooling and classifier, on (B, H, W, C)."""

    def __init__(self, in_features: int, hidden: int, num_classes: int, pool_type: str, drop_rate: float, **factory):
        super().__init__(hidden, num_classes, pool_type, drop_rate, input_fmt="NHWC", **factory)
        self.hidden = hidden
        self.proj = nn.Linear(in_features, hidden, **factory)
        self.norm = nn.BatchNorm2d(hidden, **factory)
        self.act = nn.SiLU()
        if num_classes == 0 and pool_type == "":
            self.in_features = in_features
            self.reset(0, "", **factory)  # the same as a head after this reset

    def reset(self, num_classes: int, pool_type: str | None = None, **factory) -> None:
        """Like timm's `reset`. Without classes and pooling the head becomes empty: the convolution is removed, too."""
        if num_classes == 0 and pool_type == "":
            self.proj = self.norm = self.act = nn.Identity()
        if not isinstance(self.proj, nn.Identity):
            self.in_features = self.hidden
        super().reset(num_classes, pool_type, **factory)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = on_maps(self.proj(x), self.norm, self.act)
        return super().forward(x, pre_logits=pre_logits)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        # Fan-out counts all channels, so depthwise convolutions begin small: the first in a block has no norm in front.
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)


class S2AFormer(Pyramid):
    """Four stages of hybrid perception blocks, each after a patch embedding of stride 2."""

    dilates = True

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 96, 288),
        depths: Sequence[int] = (1, 2, 6, 3),
        heads: Sequence[int] = (1, 2, 3, 9),
        reductions: Sequence[int] = (8, 4, 2, 1),
        stem_width: int = 16,
        mlp_ratio: float = 4.0,
        head_width: int = 1280,
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
        widths, depths, heads: Channels, blocks and attention heads per stage.
        reductions: Per stage, the stride at which keys and values are taken from the map.
        head_width: Channels of the convolution in the classifier's head.
        **kwargs: norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(widths):
            downsample = PatchEmbed(stem_width if i == 0 else widths[i - 1], dim, **factory)
            blocks = [
                HybridPerceptionBlock(dim, heads[i], reductions[i], mlp_ratio, rate, **factory) for rate in rates[i]
            ]
            stages.append(Stage(blocks, downsample))
        options = dict(in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
        stem = Stem(in_chans, stem_width, **factory)
        super().__init__(stem, stages, list(widths), norm_layer=_norm_layer, **options, **factory, **kwargs)
        self.norm = nn.Identity()  # the head has a norm
        self.head = ConvHead(widths[-1], head_width, num_classes, global_pool, drop_rate, **factory)
        self.apply(_init_weights)


def _cfg(top1: float) -> dict[str, Any]:
    return imagenet_cfg(
        f"{top1} (the authors' model, not this reconstruction)",
        first_conv="stem.conv1",
        origin_url="https://arxiv.org/abs/2505.22195",
        paper_name="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
        paper_ids="arXiv:2505.22195",
        description=RECONSTRUCTED,
    )


default_cfgs = generate_default_cfgs(
    {
        "s2aformer_mini": _cfg(75.1),
        "s2aformer_t": _cfg(77.7),
        "s2aformer_xs": _cfg(78.9),
        "s2aformer_s": _cfg(80.8),
        "s2aformer_m": _cfg(82.3),
    }
)


register_variants(
    __name__,
    S2AFormer,
    {
        "s2aformer_mini": dict(widths=(32, 64, 96, 288), depths=(1, 2, 6, 3), heads=(1, 2, 3, 9)),
        "s2aformer_t": dict(widths=(32, 64, 160, 320), depths=(2, 3, 6, 2), heads=(1, 2, 5, 10)),
        "s2aformer_xs": dict(widths=(32, 64, 192, 320), depths=(2, 3, 6, 2), heads=(1, 2, 6, 10)),
        "s2aformer_s": dict(widths=(32, 64, 224, 448), depths=(2, 2, 8, 2), heads=(1, 2, 7, 14), stem_width=32),
        "s2aformer_m": dict(widths=(96, 128, 256, 512), depths=(2, 3, 20, 3), heads=(3, 4, 8, 16), stem_width=32),
    },
)

"""DualToken-ViT: 7x7 position-aware global tokens that flow through all stages beside the map.

Paper: DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion, SDM 2024, arXiv 2309.12424.
Official code: none was found.

This model is reconstructed from the paper; no official weights are public. The paper gives the two streams, the steps
of a block (ConvNeXt block, step-wise downsampling, aggregation, enrichment by a weighted sum, broadcast, sum), the 7x7
tokens and both forms of the MLP. Stem, patch merging and the bi-dimensional attention after
the FFN are LightViT's (arXiv 2207.05557, code under Apache-2.0). Our choices are all widths, depths and ratios, the
layers within each step, and the place where the global tokens enter the head. They were found by counting
(model_cards/dualtokenvit.md): multiply-adds are within 5 % of the published values, and three differences from the
paper's ablations are reproduced, too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._head import POOLINGS, TokenHead
from terrazzo.backbones._layers import (
    cells,
    dimensioned,
    init_linear,
    learned_number,
    on_maps,
    pixels_of_patches,
    take_scalars,
)
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Beside, needed
from terrazzo.backbones._weights import RECONSTRUCTED, any_prefix
from terrazzo.kernels.dispatch.exporting import is_exporting

__all__ = ["DualTokenViT"]

GRID = 7  # global tokens per side
HEAD_DIM = 32

_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Tokens(Beside):
    """The state beside a map: global tokens (B, 49, C)."""

    tokens: torch.Tensor | None = None


def pool_to_grid(x: torch.Tensor) -> torch.Tensor:
    """Adaptive average pooling, (B, H, W, C) to (B, GRID * GRID, C); a smaller map repeats its positions.

    In exports it is two matrix products, because no ONNX operator pools to cells of unequal size.
    """
    if not is_exporting():
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), GRID).flatten(2).transpose(1, 2)
    rows, columns = (cells(GRID, size, x) for size in x.shape[1:3])
    x = columns @ x  # B H GRID C
    return (rows @ x.flatten(2)).unflatten(2, (GRID, -1)).flatten(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Multi-head attention of (B, N, C) to (B, L, C) with heads of HEAD_DIM channels."""
    query, key, value = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class ConvEncoder(nn.Module):
    """The residual branch of a ConvNeXt block, (B, H, W, C): depthwise 7x7, norm, MLP."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **factory)
        self.norm = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(on_maps(x, self.dwconv)))


class HalvingStep(nn.Sequential):
    """One step of the downsampling: local information by convolutions, then half the size, on (B, C, H, W).

    The last row or column of an odd side is a separate cell, as if it were repeated once.
    """

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.act = nn.GELU()
        self.pw = nn.Conv2d(dim, dim, 1, **factory)
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)


class MixMlp(nn.Module):
    """A token-mixing MLP, added to the tokens (B, N, C), then a linear layer over the channels."""

    def __init__(self, tokens: int, dim: int, **factory):
        super().__init__()
        self.tokens = Mlp(tokens, **factory)
        self.channels = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.channels(x + self.tokens(x.transpose(1, 2)).transpose(1, 2))


class PositionAwareTokens(nn.Module):
    """The global half of a block: (B, H, W, C) to the global information per position; updates the state's tokens.

    Source: arXiv 2309.12424, section 3.1, the position-aware token module, and section 3.2.
    """

    def __init__(self, dim: int, halvings: int, mix: bool, **factory):
        super().__init__()
        self.halvings = nn.Sequential(*(HalvingStep(dim, **factory) for _ in range(halvings)))
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.norm = _norm_layer(dim, **factory)
        self.alpha = learned_number(0.5, **factory)
        self.register_load_state_dict_pre_hook(take_scalars)
        self.mlp = MixMlp(GRID**2, dim, **factory) if mix else Mlp(dim, **factory)
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor, state: Tokens) -> torch.Tensor:
        aggregated = attend(*self.qkv(self.pooled(x)).chunk(3, -1))
        state.tokens = self.alpha * state.tokens + (1 - self.alpha) * self.mlp(self.norm(aggregated))
        told = attend(self.q(x).flatten(1, 2), *self.kv(state.tokens).chunk(2, -1))
        return self.proj(told).view(x.shape)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """The map (B, H, W, C) as tokens (B, GRID * GRID, C)."""
        return pool_to_grid(on_maps(x, *self.halvings))


class BiDimAttention(nn.Module):
    """LightViT's bi-dimensional attention: sigmoids scale each channel and each position of (B, H, W, C).

    Source: arXiv 2207.05557, section 3.3; names follow the authors' code.
    """

    def __init__(self, dim: int, **factory):
        super().__init__()
        reduced = dim // 4
        self.norm = nn.LayerNorm(dim, **factory)
        self.global_reduce = nn.Linear(dim, reduced, **factory)
        self.local_reduce = nn.Linear(dim, reduced, **factory)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(reduced, dim, **factory)
        self.spatial_select = nn.Linear(2 * reduced, 1, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        image = self.act(self.global_reduce(self.mean(normed)))  # B 1 1 C/4
        local = self.act(self.local_reduce(normed))
        of_channels = self.channel_select(image).sigmoid()
        of_places = self.spatial_select(torch.cat([local, image.expand_as(local)], -1)).sigmoid()
        return x * of_channels * of_places

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a map, (B, 1, 1, C)."""
        return x.mean((1, 2), keepdim=True)


class DualTokenBlock(nn.Module):
    """Local and global information, summed, then an FFN with bi-dimensional attention. The state is `Tokens`.

    Source: arXiv 2309.12424, section 3.1 and figure 2.
    """

    def __init__(self, dim: int, halvings: int, mix: bool, mlp_ratio: float, drop_path: float, **factory):
        super().__init__()
        self.local = ConvEncoder(dim, **factory)
        self.norm1 = _norm_layer(dim, **factory)
        self.glob = PositionAwareTokens(dim, halvings, mix, **factory)
        self.norm2 = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.attn = BiDimAttention(dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        state = needed(state, self)
        x = x + self.drop_path(self.local(x))
        x = x + self.drop_path(self.glob(self.norm1(x), state))
        return x + self.drop_path(self.attn(self.mlp(self.norm2(x))))


class LightPatchMerging(nn.Module):
    """LightViT's merging of (B, H, W, C): the sum of linear layers of a 2x2 patch's pixels and of their maximum."""

    def __init__(self, in_dim: int, dim: int, **factory):
        super().__init__()
        self.step: int | None = None
        self.norm = nn.LayerNorm(4 * in_dim, **factory)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, **factory)
        self.res_proj = nn.Linear(in_dim, dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = pixels_of_patches(x, self.step)
        return self.reduction(self.norm(pixels)) + self.res_proj(pixels.unflatten(-1, (4, -1)).amax(-2))

    def dilate(self, before: int, after: int) -> None:
        self.step = before


class TokenMerging(nn.Module):
    """Project the global tokens (B, 49, C) to the next stage's width; their number stays."""

    def __init__(self, in_dim: int, dim: int, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, **factory)
        self.proj = nn.Linear(in_dim, dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(x))


class DualTokenStage(Stage):
    """A stage that projects the global tokens to its width before its blocks."""

    def __init__(self, blocks: Sequence[nn.Module], in_dim: int, dim: int, **factory):
        super().__init__([], LightPatchMerging(in_dim, dim, **factory))
        del self.blocks  # set again below, as the last module: optimizer checkpoints identify parameters by order
        self.carry = TokenMerging(in_dim, dim, **factory)
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        state = needed(state, self)
        state.tokens = self.carry(state.tokens)
        return super().run(x, state)


class Stem(nn.Module):
    """LightViT's stem of stride 8, (B, in_chans, H, W) to (B, H/8, W/8, C), and the learned global tokens."""

    def __init__(self, in_chans: int, dim: int, **factory):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, GRID**2, dim, **factory))
        half = dim // 2
        self.stem = nn.Sequential()
        for i, stride in enumerate((2, 1, 1, 2)):
            chans, groups = (in_chans, 1) if i == 0 else (half, half)
            conv = nn.Conv2d(chans, half, 3, stride=stride, padding=1, groups=groups, bias=False, **factory)
            self.stem.extend((conv, nn.BatchNorm2d(half, **factory), nn.GELU()))
        self.proj = nn.Conv2d(half, dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        trunc_normal_(self.tokens, std=0.02)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        """Args:
        state: `Tokens`, which gets a copy of the global tokens for each image; None for no state.
        """
        x = self.norm(self.proj(self.stem(x)).permute(0, 2, 3, 1))
        if state is not None:
            state.tokens = self.tokens.repeat(x.shape[0], 1, 1)
        return x


class AllTokensHead(TokenHead):
    """A head on tokens (B, N, C) without a class token: it pools all tokens."""

    poolings = POOLINGS

    @staticmethod
    def positions(x: torch.Tensor) -> torch.Tensor:
        return x


class DualTokenViT(Pyramid):
    """Three stages of dual token blocks at strides 8, 16 and 32.

    `forward_features` returns the head's input (B, 49 + N, neck): the global tokens, then the positions of the last
    map.
    """

    no_decay = ("tokens", "alpha")
    gives_tokens = True
    dilates = True

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 6, 4),
        mlp_ratios: Sequence[float] = (8, 4, 4),
        mix: bool = True,
        neck: int = 1280,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_outputs: bool = False,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        widths, depths, mlp_ratios: Per stage; widths are multiples of 32, the channels of a head.
        mix: Use the token-mixing MLP, not the channel MLP, before aggregated and global tokens are summed.
        neck: Channels in front of the classifier.
        norm_outputs: See `Backbone`; there is no neck then.
        output_stride: See `Pyramid`.
        """
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(widths):
            halvings = len(widths) - 1 - i  # at 224 they end at 7x7
            blocks = [DualTokenBlock(dim, halvings, mix, mlp_ratios[i], rate, **factory) for rate in rates[i]]
            stages.append(DualTokenStage(blocks, widths[i - 1], dim, **factory) if i > 0 else Stage(blocks))
        super().__init__(
            Stem(in_chans, widths[0], **factory),
            stages,
            widths,
            stem_stride=8,
            output_stride=output_stride,
            norm_layer=_norm_layer,
            in_chans=in_chans,
            num_classes=num_classes,
            norm_outputs=norm_outputs,
            **factory,
        )
        self.neck = nn.Identity()
        if not norm_outputs:
            self.neck = nn.Sequential(nn.Linear(widths[-1], neck, **factory), nn.LayerNorm(neck, **factory), nn.GELU())
            self.num_features = neck
        self.head = AllTokensHead(self.num_features, num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Tokens]:
        state = Tokens()
        return self.stem(x, state), state

    def to_features(self, x: torch.Tensor, state: Tokens) -> torch.Tensor:
        return self.neck(self.norm(torch.cat([state.tokens, x.flatten(1, 2)], 1)))

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Like `Backbone`'s method; the neck is removed together with the norm."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.norm, nn.Identity):
            self.neck = nn.Identity()
            self.num_features = self.feature_info[len(self.stages) - 1]["num_chs"]
            self.reset_classifier(self.num_classes)
        return taken


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn a checkpoint into a state dict of `model`; older checkpoints may have a 0-d `alpha`."""
    return dimensioned(state_dict, model)


def _cfg(top1: float | None) -> dict[str, Any]:
    return imagenet_cfg(
        "unknown" if top1 is None else f"{top1} (the authors' model, not this reconstruction)",
        first_conv="stem.stem.0",
        origin_url="https://arxiv.org/abs/2309.12424",
        paper_name="DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
        paper_ids="arXiv:2309.12424",
        description=RECONSTRUCTED,
    )


default_cfgs = generate_default_cfgs(
    {
        "dualtokenvit_tiny": _cfg(None),
        "dualtokenvit_tiny_mix": _cfg(75.4),
        "dualtokenvit_small": _cfg(79.5),
        "dualtokenvit_small_mix": _cfg(79.4),
    }
)


register_variants(
    __name__,
    DualTokenViT,
    {
        "dualtokenvit_tiny": dict(widths=(32, 96, 160), mix=False),
        "dualtokenvit_tiny_mix": dict(widths=(32, 96, 160), mix=True),
        "dualtokenvit_small": dict(widths=(64, 128, 256), mix=False),
        "dualtokenvit_small_mix": dict(widths=(64, 128, 256), mix=True),
    },
    out_indices=(0, 1, 2),
)

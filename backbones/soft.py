"""SOFT and SOFT++: stages of softmax-free attention after each other, then a stage of softmax attention.

Papers:
    SOFT: Softmax-free Transformer with Linear Complexity, NeurIPS 2021, arXiv 2110.11945.
    Softmax-free Linear Transformers (SOFT++), IJCV 2024, arXiv 2207.03341.
Official code: github.com/fudan-zvg/SOFT (MIT); SOFT++ is its class "Norm". Weights by the authors, MIT, by hand.

Where paper and code differ, this is the code. Deviations and choices:
- The official "Norm" classes cannot be made (a wrong name in a constructor); the repair is obvious.
- `small`: the code has 20 blocks in stage 3, 38.9 M parameters; the paper's 24 M and 3.3 G need 7, the default here.
  A checkpoint of another depth is refused, and the message names the argument.
- SOFT++ starts Newton's iteration from a maximum over the whole batch, so an image's result depends on its neighbours
  in the batch. Official weights were trained so, and it is the default; `alpha_scope="matrix"` treats images apart.
- The code for detection was not released. Maps of stage 4 come without the class token, but have attended to it, so
  that classifiers, detectors and segmentors have one state dict.
- Linear layers begin as truncated normal numbers in SOFT++, too; the official class draws them twice.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._dilation import dilate
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import WideLayerNorm, init_linear, trunc_normal_
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Grid
from terrazzo.backbones._weights import any_prefix, rename
from terrazzo.errors import InputError
from terrazzo.kernels import softmax_free_attention
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.softmax_free_attention import check_scope

__all__ = ["SOFT"]

HEAD_DIM = 32
MLP_RATIO = 4
SIDES = (56, 28, 14, 7)  # of the position embeddings, per stage

_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class WideConv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input, for inputs wider than its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


class HeadConv(nn.Conv2d):
    """A depthwise convolution of (B, H, W, C) with one kernel for all channels of a head."""

    def __init__(self, heads: int, kernel: int, **factory):
        super().__init__(heads, heads, kernel, padding=kernel // 2, groups=heads, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.expand(-1, HEAD_DIM, -1, -1).reshape(-1, 1, *self.kernel_size)
        around = dict(padding=self.padding, dilation=self.dilation)
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, groups=HEAD_DIM * self.groups, **around)
        return x.permute(0, 2, 3, 1)


class SoftmaxFreeAttention(nn.Module):
    """Attention on (B, H, W, C) with a Gaussian kernel, whose keys are the queries, plus a convolution of values.

    Landmarks are a convolution of the map of queries, the same for all heads, then a norm and GELU.

    Source: arXiv 2110.11945, section 3; SOFT++: arXiv 2207.03341, section 3. Names follow the authors' code.
    """

    def __init__(self, dim: int, ratio: int, kernel: int, normalised: bool, alpha_scope: str, **factory):
        super().__init__()
        self.ratio = ratio
        self.dilation = 1
        self.normalised = normalised
        self.alpha_scope = alpha_scope
        self.W_q = nn.Linear(dim, dim, **factory)
        self.W_v = nn.Linear(dim, dim, **factory)
        self.Qlandmark_op = WideConv2d(HEAD_DIM, HEAD_DIM, ratio, stride=ratio, bias=False, **factory)
        self.Qnorm_act = nn.Sequential(WideLayerNorm(HEAD_DIM, eps=1e-5, **factory), nn.GELU())
        self.conv = HeadConv(dim // HEAD_DIM, kernel, **factory)
        self.ff = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = (self.ratio - 1) * self.dilation + 1
        if not is_exporting() and min(x.shape[1:3]) < side:
            raise InputError(
                f"the map's sides must be at least {side}, the side of the squares that give a landmark, got "
                f"{tuple(x.shape[1:3])}: take larger images, or create the model with smaller ratios"
            )
        query, value = self.W_q(x), self.W_v(x)
        with without_autocast(x):
            query = query.to(accumulator(query)) * HEAD_DIM**-0.25
            maps = query.unflatten(3, (-1, HEAD_DIM)).permute(0, 3, 4, 1, 2)  # B heads D H W
            cells = self.Qlandmark_op(maps.flatten(0, 1)).flatten(2).transpose(1, 2)
            landmarks = self.Qnorm_act(cells).unflatten(0, (-1, maps.shape[1]))
        query, tokens = (y.flatten(1, 2).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for y in (query, value))
        options = dict(normalised=self.normalised, alpha_scope=self.alpha_scope)
        out = softmax_free_attention(query, tokens, landmarks, **options)
        return self.ff(out.transpose(1, 2).flatten(2).unflatten(1, value.shape[1:3]) + self.conv(value))

    def dilate(self, before: int, after: int) -> None:
        """Landmarks are of the same part of the image, and take a part of its positions."""
        self.dilation = after
        self.Qlandmark_op.dilation = (after, after)
        self.Qlandmark_op.stride = (self.ratio * after,) * 2
        dilate(self.conv, before, after)


class SoftmaxFreeBlock(nn.Module):
    """Attention and an MLP on (B, H, W, C), each added to its input before a norm, with dropout of single elements."""

    def __init__(self, dim: int, drop: float, *attention, **factory):
        """Args:
        attention: see `SoftmaxFreeAttention`.
        """
        super().__init__()
        self.attn = SoftmaxFreeAttention(dim, *attention, **factory)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, MLP_RATIO * dim, act_layer=partial(nn.GELU, approximate="tanh"), **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class SoftmaxAttention(nn.Module):
    """Multi-head attention of tokens (B, N, C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.q(x), *self.kv(x).chunk(2, -1))
        parts = (y.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for y in parts)
        return self.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class SoftmaxBlock(nn.Module):
    """Pre-norm attention and MLP on tokens (B, N, C)."""

    def __init__(self, dim: int, drop_path: float, **factory):
        super().__init__()
        self.norm1 = _norm_layer(dim, **factory)
        self.attn = SoftmaxAttention(dim, **factory)
        self.norm2 = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, MLP_RATIO * dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvUnits(nn.Sequential):
    """Convolutions of 3x3, each with batch norm and ReLU, on (B, H, W, C)."""

    def __init__(self, *units: tuple[int, int, int], **factory):
        """Args:
        units: For each convolution its channels before and after, and its stride.
        """
        layers = []
        for before, after, stride in units:
            conv = nn.Conv2d(before, after, 3, stride, padding=1, **factory)
            layers += [conv, nn.BatchNorm2d(after, **factory), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(ConvUnits):
    """Three convolutions of stride 4 in all, image to (B, H/4, W/4, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


class PositionStage(Stage):
    """A stage that adds position embeddings, resized bilinearly to the map (B, H, W, C), before its blocks."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, dim: int, side: int, **factory):
        super().__init__(blocks, downsample)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side + self.prefix, dim, **factory))
        self.side = side

    prefix = 0

    def run(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        return super().run(x + self.positions(x), state)

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """The position embeddings of the pixels of a map, (1, H, W, C)."""
        table = self.pos_embed[:, self.prefix :].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        with without_autocast(x):
            table = F.interpolate(table, x.shape[1:3], mode="bilinear", align_corners=False)
        return table.permute(0, 2, 3, 1)


class TokenStage(PositionStage):
    """The last stage, (B, H, W, C) to tokens (B, 1 + H W, C): the class token is in front.

    The class token's position is the first row of the embeddings.
    """

    prefix = 1

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module, dim: int, side: int, **factory):
        super().__init__(blocks, downsample, dim, side, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))

    def run(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        if state is not None:
            state.grid = tuple(x.shape[1:3])
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([token.expand(x.shape[0], -1, -1), (x + self.positions(x)).flatten(1, 2)], 1)
        return Stage.run(self, x, state)


class SOFT(Pyramid):
    """Three stages of softmax-free attention at strides 4, 8 and 16, then softmax attention at stride 32.

    `forward_features` returns the head's input, the normalised tokens of stage 4 (B, 1 + N, C) with the class token in
    front. Features are maps, without the token.
    """

    no_decay = ("pos_embed", "cls_token")
    gives_tokens = True
    dilates = True

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        ratios: Sequence[int] = (8, 4, 2),
        kernels: Sequence[int] = (9, 5, 3),
        normalised: bool = False,
        alpha_scope: str = "global",
        stem_width: int = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        widths: Channels of the stages, multiples of 32, the channels of a head.
        depths: Blocks of the stages.
        ratios: Of the first three stages, the side of the squares that give a landmark. A larger ratio makes large
            images cheaper; weights for other ratios do not fit.
        kernels: Of the first three stages, the side of the kernel that convolves values, odd.
        normalised: False for SOFT, True for SOFT++.
        alpha_scope: For SOFT++, "global" (as published) or "matrix"; see `softmax_free_attention`.
        global_pool: "token" for the class token; timm's other poolings take the patches.
        drop_path_rate: Also the rate of dropout in the first three stages, as published.
        **kwargs: norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        check_scope(alpha_scope)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        last, stages = len(widths) - 1, []
        for i, dim in enumerate(widths):
            downsample = ConvUnits((widths[i - 1], dim, 2), **factory) if i > 0 else None
            if i == last:
                blocks = [SoftmaxBlock(dim, rate, **factory) for rate in rates[i]]
            else:
                attention = ratios[i], kernels[i], normalised, alpha_scope
                blocks = [SoftmaxFreeBlock(dim, rate, *attention, **factory) for rate in rates[i]]
            kind = TokenStage if i == last else PositionStage
            stages.append(kind(blocks, downsample, dim, SIDES[i], **factory))
        options = dict(in_chans=in_chans, num_classes=num_classes, global_pool="avg", drop_rate=drop_rate)
        stem = Stem((in_chans, stem_width, 2), (stem_width, stem_width, 1), (stem_width, widths[0], 2), **factory)
        super().__init__(stem, stages, list(widths), norm_layer=_norm_layer, **options, **factory, **kwargs)
        self.head = TokenHead(widths[-1], num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)
        for stage in self.stages:
            for name in self.no_decay:
                if hasattr(stage, name):
                    trunc_normal_(getattr(stage, name), std=0.02)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        return self.stem(x), Grid()

    def to_map(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return x if x.dim() == 4 else x[:, 1:].unflatten(1, state.grid)

    def to_features(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return self.norm(x)


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed1\.proj\.", "stem."),
    *((rf"^patch_embed{i + 1}\.proj\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
    *((rf"^pos_embed{i + 1}$", f"stages.{i}.pos_embed") for i in range(4)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"^cls_token$", "stages.3.cls_token"),
    (r"\.att\.mha\.attn\.", ".attn."),
    (r"\.att\.mha\.", ".attn."),
    (r"\.att\.ff([12])\.", r".mlp.fc\1."),
    (r"\.att\.", "."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint into a state dict of `model`.

    Raises:
        InputError: stage 3 has another number of blocks than the model's.
    """
    state_dict = rename(state_dict, OFFICIAL_NAMES)
    found = [int(match[1]) + 1 for name in state_dict if (match := re.match(r"stages\.2\.blocks\.(\d+)\.", name))]
    depths = [len(stage.blocks) for stage in model.stages]
    if found and len(depths) > 2 and max(found) != depths[2]:
        depths[2] = max(found)
        raise InputError(
            f"the checkpoint has {max(found)} blocks in stage 3, the model {len(model.stages[2].blocks)}; "
            f"create the model with depths={tuple(depths)}"
        )
    return state_dict


def _cfg(top1: float, weights: str | None = None, plus: bool = False) -> dict[str, Any]:
    about = dict(
        paper_name="Softmax-free Linear Transformers"
        if plus
        else "SOFT: Softmax-free Transformer with Linear Complexity",
        paper_ids="arXiv:2207.03341" if plus else "arXiv:2110.11945",
        origin_url="https://github.com/fudan-zvg/SOFT",
        first_conv="stem.0",
    )
    if weights is not None:
        about["license"] = "mit"
        about["description"] = (
            f"weights must be fetched by hand from https://github.com/fudan-zvg/SOFT ({weights} in its README)"
        )
    return imagenet_cfg(top1, **about)


default_cfgs = generate_default_cfgs(
    {
        "soft_tiny": _cfg(79.3, "SOFT_Tiny"),
        "soft_small": _cfg(82.2),
        "soft_medium": _cfg(82.9),
        "soft_large": _cfg(83.1),
        "soft_huge": _cfg(83.3),
        "softpp_tiny": _cfg(79.4, "SOFT_Tiny_norm", plus=True),
        "softpp_small": _cfg(82.4, "SOFT_Small_norm", plus=True),
        "softpp_medium": _cfg(83.1, "SOFT_Medium_norm", plus=True),
        "softpp_large": _cfg(83.3, "SOFT_Large_norm", plus=True),
        "softpp_huge": _cfg(83.4, plus=True),
    }
)

_SIZES = {
    "tiny": dict(depths=(1, 2, 3, 2)),
    "small": dict(depths=(1, 3, 7, 4)),
    "medium": dict(widths=(64, 128, 288, 512), depths=(1, 3, 29, 5)),
    "large": dict(depths=(1, 3, 40, 5)),
    "huge": dict(widths=(64, 128, 352, 512), depths=(1, 5, 49, 5)),
}

register_variants(
    __name__,
    SOFT,
    {f"soft_{size}": arguments for size, arguments in _SIZES.items()}
    | {f"softpp_{size}": dict(arguments, normalised=True) for size, arguments in _SIZES.items()},
)

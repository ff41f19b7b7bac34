"""FMViT: convolutions and attention whose pointwise layers have several branches in training, and one for inference.

Paper: FMViT: A multiple-frequency mixing Vision Transformer, 2023, arXiv 2311.05707.
Official code: github.com/tany0699/FMViT has a licence (Apache-2.0) and no code.

This model is reconstructed from the paper; no official weights are public. The paper gives the parts (a block that
mixes high and low frequencies, pointwise layers that are reparameterised, a lighter attention, convolutional blocks)
and each variant's parameters and multiply-adds. What it does not give is Next-ViT's (arXiv 2207.05501), on which it
builds: stem, head, mixing of local and global parts, batch norm, ReLU. Our choices are all widths and depths, one
attention per stage, and the clamp of its width. They give every published digit of parameters and multiply-adds; other
choices would match, too (model_cards/fmvit.md).

The published sizes belong to the form for inference. `terrazzo.reparameterize(model)` makes it from a trained model,
and `deploy=True` builds it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from terrazzo.backbones._layers import trunc_normal_
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._weights import RECONSTRUCTED, any_prefix, rename
from terrazzo.errors import InputError

__all__ = ["FMViT"]

WIDTH = 32  # channels of a group of convolutions, and of a head of attention
GROUPS = (1, 2, 4)  # of the branches of a pointwise layer
REDUCTIONS = (8, 4, 2, 1)  # of keys and values, per side, in each stage

Affine = tuple[torch.Tensor, torch.Tensor]
"""Factors and summands (C,) of each channel, in float64."""


def affine(norm: nn.BatchNorm2d) -> Affine:
    """What batch norm computes in evaluation mode."""
    mean, variance, weight, bias = _numbers_of(norm)
    factor = weight * (variance + norm.eps).rsqrt()
    return factor, bias - factor * mean


def normalised(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, in float64, of a convolution without bias and the norm behind it."""
    mean, variance, weight, bias = _numbers_of(norm)
    return fuse_conv_bn_weights(conv.weight.detach().double(), None, mean, variance, norm.eps, weight, bias)


def _numbers_of(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
    if norm.training:
        raise InputError("batch norm has no fixed factors in training mode: call model.eval() first")
    return tuple(x.detach().double() for x in (norm.running_mean, norm.running_var, norm.weight, norm.bias))


def dense(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight (O, I, 1, 1) of the pointwise convolution that equals one with groups, (O, I / groups, 1, 1)."""
    return torch.block_diag(*weight.flatten(1).chunk(groups))[..., None, None]


def joined(like: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution of the same map as another, with a bias, and with the groups that the shape of the weight says."""
    shape = (like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding)
    factory = dict(device=like.weight.device, dtype=like.weight.dtype)
    conv = nn.Conv2d(*shape, like.dilation, groups=like.in_channels // weight.shape[1], **factory)
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    return conv.train(like.training)


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm; for inference a convolution with bias."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        side: int = 1,
        stride: int = 1,
        groups: int = 1,
        deploy: bool = False,
        **factory,
    ):
        super().__init__()
        made = dict(stride=stride, padding=side // 2, groups=groups, bias=deploy, **factory)
        self.conv = nn.Conv2d(in_chans, out_chans, side, **made)
        self.bn = nn.Identity() if deploy else nn.BatchNorm2d(out_chans, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    def reparameterize(self) -> None:
        """Join the norm with the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = joined(self.conv, *normalised(self.conv, self.bn)), nn.Identity()


class GroupedMlp(nn.Module):
    """The paper's gMLP on (B, C, H, W): a sum of pointwise convolutions with 1, 2 and 4 groups, each with batch norm.

    If input and output have as many channels, batch norm of the input is added. For inference it is one convolution.
    """

    def __init__(self, in_chans: int, out_chans: int, groups: Sequence[int] = GROUPS, deploy: bool = False, **factory):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 1, **factory) if deploy else None
        if not deploy:
            fitting = [g for g in groups if in_chans % g == 0 and out_chans % g == 0]
            self.branches = nn.ModuleList(ConvNorm(in_chans, out_chans, groups=g, **factory) for g in fitting)
            self.identity = nn.BatchNorm2d(in_chans, **factory) if in_chans == out_chans else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is not None:
            return self.conv(x)
        found = [branch(x) for branch in self.branches]
        if self.identity is not None:
            found.append(self.identity(x))
        return functools.reduce(torch.add, found)

    def reparameterize(self, before: Affine | None = None) -> None:
        """Join the branches.

        Args:
            before: Factors and summands of the input's channels, which become a part of the layer; None for none.
        """
        if self.conv is not None:
            return
        parts = [
            (dense(weight, b.conv.groups), bias) for b in self.branches for weight, bias in [normalised(b.conv, b.bn)]
        ]
        if self.identity is not None:
            factor, shift = affine(self.identity)
            parts.append((factor.diag()[..., None, None], shift))
        weight, bias = (sum(part) for part in zip(*parts))
        if before is not None:
            factor, shift = before
            bias = bias + weight.flatten(1) @ shift
            weight = weight * factor[:, None, None]
        self.conv = joined(self.branches[0].conv, weight, bias)
        del self.branches, self.identity


class SlidingMean(nn.Module):
    """The mean of the four pixels of a 2x2 patch at each position of (B, C, H, W); edges are repeated."""

    def __init__(self, step: int):
        """Args:
        step: The distance of the pixels.
        """
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, self.step, 0, self.step), mode="replicate")
        x = (x[:, :, : -self.step] + x[:, :, self.step :]) / 2
        return (x[..., : -self.step] + x[..., self.step :]) / 2


class PatchEmbed(nn.Module):
    """Half the resolution by averages of 2 x 2, if `stride` is 2, then a pointwise layer."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, **factory):
        super().__init__()
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        same = stride == 1 and in_chans == out_chans
        self.proj = nn.Identity() if same else GroupedMlp(in_chans, out_chans, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pool(x))

    def dilate(self, before: int, after: int) -> None:
        self.pool = SlidingMean(before) if isinstance(self.pool, nn.AvgPool2d) else self.pool


class Mix(ConvNorm):
    """High frequencies: a 3x3 convolution with groups of 32 channels, batch norm, ReLU, then a pointwise layer."""

    def __init__(self, dim: int, deploy: bool = False, **factory):
        super().__init__(dim, dim, 3, groups=dim // WIDTH, deploy=deploy, **factory)
        self.proj = GroupedMlp(dim, dim, deploy=deploy, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.relu(super().forward(x)))


class FeedForward(nn.Module):
    """Batch norm, then two pointwise layers with ReLU in between."""

    def __init__(self, dim: int, ratio: int, deploy: bool = False, **factory):
        super().__init__()
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(dim, **factory)
        self.fc1 = GroupedMlp(dim, ratio * dim, deploy=deploy, **factory)
        self.fc2 = GroupedMlp(ratio * dim, dim, deploy=deploy, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(self.norm(x))))

    def reparameterize(self) -> None:
        """Join the norm with the first layer."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.fc1.reparameterize(affine(self.norm))
            self.norm = nn.Identity()


class Attention(nn.Module):
    """The paper's RLMHSA: softmax attention of all positions to averages of `reduction` x `reduction` positions.

    Projections have one branch and batch norm of the input beside it; for inference they are convolutions.
    """

    def __init__(self, dim: int, reduction: int, deploy: bool = False, **factory):
        super().__init__()
        self.heads = dim // WIDTH
        self.norm = nn.Identity() if deploy else nn.BatchNorm2d(dim, **factory)
        self.pool = self.pool_norm = nn.Identity()
        if reduction > 1:
            self.pool = nn.AvgPool2d(reduction, reduction, ceil_mode=True, count_include_pad=False)
            self.pool_norm = nn.Identity() if deploy else nn.BatchNorm2d(dim, **factory)
        self.q, self.k, self.v, self.proj = (
            GroupedMlp(dim, dim, groups=(1,), deploy=deploy, **factory) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        fewer = self.pool_norm(self.pool(x))
        query, key, value = (
            y.flatten(2).unflatten(1, (self.heads, WIDTH)).transpose(2, 3)
            for y in (self.q(x), self.k(fewer), self.v(fewer))
        )
        out = self.attended(query, key, value, fewer)
        out = out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        # On CPUs, PyTorch 2.14's batch norm has wrong gradients for one image whose channels are innermost in memory.
        return self.proj(out.contiguous())

    def attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fewer: torch.Tensor
    ) -> torch.Tensor:
        """Attention (B, heads, N, D) to the positions of the map of averages `fewer` (B, C, h, w)."""
        return F.scaled_dot_product_attention(query, key, value)

    def dilate(self, before: int, after: int) -> None:
        """Averages are of the same part of the image."""
        if isinstance(self.pool, nn.AvgPool2d):
            self.pool.kernel_size *= after
            self.pool.stride *= after

    def reparameterize(self) -> None:
        """Join norms with projections. Averages of a scaled and shifted map are its averages, scaled and shifted."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        factor, shift = affine(self.norm)
        self.q.reparameterize((factor, shift))
        if isinstance(self.pool_norm, nn.BatchNorm2d):
            outer, more = affine(self.pool_norm)
            factor, shift = outer * factor, outer * shift + more
        self.k.reparameterize((factor, shift))
        self.v.reparameterize((factor, shift))
        self.norm = self.pool_norm = nn.Identity()


class ConvFusionBlock(nn.Module):
    """The paper's CFB: a patch embedding, a local convolution and a feed-forward layer."""

    def __init__(self, in_chans: int, dim: int, stride: int, drop_path: float, **factory):
        super().__init__()
        self.patch_embed = PatchEmbed(in_chans, dim, stride, **factory)
        self.mix = Mix(dim, **factory)
        self.ffn = FeedForward(dim, 3, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mix(x))
        return x + self.drop_path(self.ffn(x))


class FrequencyFusionBlock(nn.Module):
    """The paper's FMB: low frequencies by attention, high frequencies by a local convolution of them, side by side."""

    def __init__(self, in_chans: int, dim: int, stride: int, reduction: int, drop_path: float, **factory):
        super().__init__()
        low = max(WIDTH, min(dim - WIDTH, (3 * dim + 64) // 128 * WIDTH))  # three quarters, in heads
        self.patch_embed = PatchEmbed(in_chans, low, stride, **factory)
        self.attn = Attention(low, reduction, **factory)
        self.to_high = GroupedMlp(low, dim - low, **factory)
        self.mix = Mix(dim - low, **factory)
        self.ffn = FeedForward(dim, 2, **factory)
        self.drop_path, self.drop_low, self.drop_high = (
            DropPath(drop_path * part) if drop_path > 0 else nn.Identity() for part in (1, 0.75, 0.25)
        )

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        low = self.patch_embed(x)
        low = low + self.drop_low(self.attn(low))
        high = self.to_high(low)
        high = high + self.drop_high(self.mix(high))
        x = torch.cat([low, high], 1)
        return x + self.drop_path(self.ffn(x))


class StemConv(ConvNorm):
    """A 3x3 convolution with batch norm and ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, **factory):
        super().__init__(in_chans, out_chans, 3, stride, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FMViT(Pyramid):
    """FMViT: four stages of convolutional blocks; the last block of each stage but the first has attention.

    Source: arXiv 2311.05707, and arXiv 2207.05501 for what it does not state.
    """

    map_fmt = "NCHW"
    dilates = True

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 128, 224),
        depths: Sequence[int] = (1, 2, 3, 3),
        stem: Sequence[int] = (16, 16, 16),
        deploy: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        dims, depths: Channels, multiples of 32 and from the second stage on at least 64, and blocks of each stage.
        stem: Channels of the stem's first three convolutions; the fourth has as many as the third.
        deploy: Build the form for inference, which loads the state dict of a reparameterised model.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.

        Raises:
            InputError: A stage's channels are not valid.
        """
        for i, dim in enumerate(dims):
            if dim % WIDTH or dim < WIDTH * (1 if i == 0 else 2):
                raise InputError(
                    f"dims must be multiples of {WIDTH}, from the second on at least {2 * WIDTH}, got {dim}"
                )
        made = dict(deploy=deploy, device=device, dtype=dtype)
        before, widths = [in_chans, *stem, stem[-1]], [*stem, stem[-1]]
        convs = [StemConv(*pair, stride, **made) for *pair, stride in zip(before, widths, (2, 1, 1, 2))]
        stages, chans = [], stem[-1]
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            blocks = []
            for j, rate in enumerate(rates):
                stride = 2 if i > 0 and j == 0 else 1
                if i > 0 and j == len(rates) - 1:
                    block = FrequencyFusionBlock(chans, dims[i], stride, REDUCTIONS[i], rate, **made)
                else:
                    block = ConvFusionBlock(chans, dims[i], stride, rate, **made)
                blocks.append(block)
                chans = dims[i]
            stages.append(Stage(blocks))
        factory = dict(device=device, dtype=dtype)
        kwargs = dict(norm_layer=nn.BatchNorm2d, in_chans=in_chans, **factory, **kwargs)
        super().__init__(nn.Sequential(*convs), stages, dims, **kwargs)
        self.apply(_init_weights)


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn weights whose names have no `blocks`, such as `stages.0.1.ffn.norm.weight`, into a state dict of `model`.

    Raises:
        InputError: The weights are of the other form.
    """
    state_dict = rename(state_dict, [(r"^stages\.(\d+)\.(?=\d)", r"stages.\1.blocks.")])
    deployed, wanted = "stem.0.conv.bias" in state_dict, model.stem[0].conv.bias is not None
    if deployed and not wanted:
        raise InputError("the checkpoint has the form for inference: create the model with deploy=True")
    if wanted and not deployed:
        raise InputError(
            "the checkpoint has the form for training: load it into a model without deploy=True, then call "
            "terrazzo.reparameterize(model)"
        )
    return state_dict


def _cfg(top1: float) -> dict[str, Any]:
    return imagenet_cfg(
        f"{top1} (the authors' model, not this reconstruction)",
        first_conv="stem.0.conv",
        origin_url="https://github.com/tany0699/FMViT",
        paper_name="FMViT: A multiple-frequency mixing Vision Transformer",
        paper_ids="arXiv:2311.05707",
        description=RECONSTRUCTED,
    )


default_cfgs = generate_default_cfgs(
    {
        "fmvit_tiny": _cfg(72.9),
        "fmvit_small": _cfg(78.5),
        "fmvit_medium": _cfg(80.3),
        "fmvit_base": _cfg(82.4),
        "fmvit_large": _cfg(83.3),
    }
)

register_variants(
    __name__,
    FMViT,
    {
        "fmvit_tiny": dict(dims=(32, 64, 128, 224), depths=(1, 2, 3, 3), stem=(16, 16, 16)),
        "fmvit_small": dict(dims=(32, 64, 192, 384), depths=(2, 2, 4, 4), stem=(32, 16, 32)),
        "fmvit_medium": dict(dims=(64, 128, 256, 512), depths=(2, 3, 7, 4), stem=(32, 32, 32)),
        "fmvit_base": dict(dims=(64, 128, 352, 608), depths=(3, 4, 12, 4), stem=(32, 32, 64)),
        "fmvit_large": dict(dims=(96, 192, 384, 640), depths=(3, 4, 18, 4), stem=(64, 32, 64)),
    },
)

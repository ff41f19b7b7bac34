"""MTAIR: one network for noise, rain and haze, a U of channel attention, selective scans and learned prompts.

Paper: Multi-dimensional Visual Prompt Enhanced Image Restoration via Mamba-Transformer Aggregation, 2024, arXiv
2412.15845. Official code: github.com/12138-chr/MTAIR, without a licence: the outer network and training scripts only.

This model is reconstructed from the paper; no official weights are public. The outer network is that of the code: its
stages, blocks, heads, channels, resampling, skip connections and names, and the sizes of the prompts. The blocks and
the inside of a prompt block are not published. They are chosen here: Restormer's block (arXiv 2111.09881) at high
resolutions; the same with a scan beside its attention at low resolutions, from the paper's words of a branch for
channels and a branch for space; PromptIR's prompts (arXiv 2306.13090), read by channel attention. PromptIR's weights
do not fit: its prompts stand elsewhere.

The convolutions `chnl_reduce*` and `reduce_noise_channel_*` of the code are never used: they are left out here, and
ignored in checkpoints.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from timm.models._manipulate import checkpoint_seq
from torch import nn

from terrazzo.backbones._checks import number, whole, wholes
from terrazzo.backbones._ss2d import SS2D
from terrazzo.backbones._weights import RECONSTRUCTED, any_prefix
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.restoration._model import RestorationModel
from terrazzo.restoration._registration import register_variants, restoration_cfg

__all__ = ["MTAIR"]

STATES = 16
PROMPTS = 5


def _conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, **factory) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False, **factory)


class Norm(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.body = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channel_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Attention between the channels of maps (B, C, H, W): softmax(temperature q k^T) v, with q and k of length 1.

    The matrix has C / heads rows, so the cost is linear in the pixels.

    Args:
        temperature: (heads, 1, 1).

    Source: Restormer, arXiv 2111.09881, equation 1.
    """
    size, dtype = query.shape[2:], accumulator(query)  # squares of a whole map are summed
    query, key, value = (x.flatten(2).unflatten(1, (len(temperature), -1)) for x in (query, key, value))  # B heads c HW
    query, key = (F.normalize(x.to(dtype), dim=-1).to(x.dtype) for x in (query, key))
    weights = (query @ key.transpose(-1, -2) * temperature).softmax(-1).to(value.dtype)
    return (weights @ value).flatten(1, 2).unflatten(-1, size)


class MDTA(nn.Module):
    """Restormer's transposed attention: `channel_attention` of projections with 3x3 convolutions."""

    def __init__(self, dim: int, heads: int, **factory):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1, **factory))
        self.qkv = _conv(dim, 3 * dim, **factory)
        self.qkv_dwconv = _conv(3 * dim, 3 * dim, 3, groups=3 * dim, **factory)
        self.project_out = _conv(dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_dwconv(self.qkv(x)).chunk(3, 1)
        return self.project_out(channel_attention(query, key, value, self.temperature))


class GDFN(nn.Module):
    """Restormer's perceptron: one half of the channels, through GELU, gates the other."""

    def __init__(self, dim: int, ratio: float, **factory):
        super().__init__()
        hidden = int(dim * ratio)
        self.project_in = _conv(dim, 2 * hidden, **factory)
        self.dwconv = _conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden, **factory)
        self.project_out = _conv(hidden, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * x)


class Block(nn.Module):
    """x + MDTA(norm(x)), then x + GDFN(norm(x)); a dual block also adds SS2D(norm(x)) in its first half.

    Restormer's block, and our choice of the paper's Mamba-Transformer block: attention between channels, and scans over
    space (VMamba's, in its first version).
    """

    def __init__(self, dim: int, heads: int, ffn_ratio: float, dual: bool, ssm_ratio: float, **factory):
        super().__init__()
        self.norm1 = Norm(dim, **factory)
        self.attn = MDTA(dim, heads, **factory)
        self.op = SS2D(dim, ssm_ratio, STATES, gated=True, **factory) if dual else None
        self.norm2 = Norm(dim, **factory)
        self.ffn = GDFN(dim, ffn_ratio, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        mixed = x + self.attn(normed)
        if self.op is not None:
            mixed = mixed + self.op(normed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return mixed + self.ffn(self.norm2(mixed))


class PromptBlock(nn.Module):
    """Adds to a map what it reads from a prompt: a mixture of learned maps, weighted by the map's mean.

    The mixture is PromptIR's; the channel attention by which the map reads it is our choice.

    Args:
        dim: Channels of the map.
        prompt_dim: Channels of the prompts.
        size: Side of the learned maps, which are resized to the map.
        heads: Heads of the attention.
    """

    def __init__(self, dim: int, prompt_dim: int, size: int, heads: int = 4, **factory):
        super().__init__()
        self.prompt_param = nn.Parameter(torch.empty(PROMPTS, prompt_dim, size, size, **factory).uniform_())
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1, **factory))
        self.linear_layer = nn.Linear(dim, PROMPTS, **factory)
        self.conv3x3 = _conv(prompt_dim, prompt_dim, 3, **factory)
        self.q = _conv(dim, dim, **factory)
        self.kv = _conv(prompt_dim, 2 * dim, **factory)
        self.project_out = _conv(dim, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.linear_layer(x.mean((2, 3))).softmax(1)
        prompt = torch.einsum("bp,pchw->bchw", shares, self.prompt_param)
        prompt = F.interpolate(prompt, x.shape[2:], mode="bilinear", align_corners=False)
        key, value = self.kv(self.conv3x3(prompt)).chunk(2, 1)
        return x + self.project_out(channel_attention(self.q(x), key, value, self.temperature))


class _Embed(nn.Module):
    def __init__(self, in_chans: int, dim: int, **factory):
        super().__init__()
        self.proj = _conv(in_chans, dim, 3, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class _Resampled(nn.Module):
    """A 3x3 convolution, then half the side and twice the channels, or the reverse."""

    def __init__(self, dim: int, up: bool, **factory):
        super().__init__()
        shuffle = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)
        self.body = nn.Sequential(_conv(dim, 2 * dim if up else dim // 2, 3, **factory), shuffle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class MTAIR(RestorationModel):
    """A U of four levels with prompts in its skip connections; the output is added to the picture.

    Any size works: `forward` reflects pixels up to multiples of 8. Sources: arXiv 2412.15845 and the authors' code for
    the outer network, ours for the blocks (see the module).
    """

    tasks = ("denoising", "deraining", "dehazing")
    multiple = 8

    def __init__(
        self,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        prompt_dims: Sequence[int] = (64, 128, 320, 320),
        prompt_sizes: Sequence[int] = (128, 64, 32, 16),
        ssm_ratio: float = 1.0,
        dual_at_high_res: bool = False,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        dim: Channels at full size; twice as many at each of three smaller sizes.
        num_blocks: Blocks of each level, from full size.
        num_refinement_blocks: Blocks behind the U, at full size, with scans.
        heads: Heads of each level's attentions; they divide its channels.
        ffn_expansion_factor: Hidden channels of a perceptron per channel.
        prompt_dims, prompt_sizes: Channels and side of each level's prompts.
        ssm_ratio: Scanned channels per channel.
        dual_at_high_res: Whether blocks of the two large sizes scan, too.

        Raises:
            InputError: A number is not valid, or heads do not divide channels.
        """
        super().__init__(upscale=1, in_chans=in_chans)
        counts, heads = wholes("num_blocks", num_blocks), wholes("heads", heads)
        prompts = tuple(zip(wholes("prompt_dims", prompt_dims), wholes("prompt_sizes", prompt_sizes)))
        _check(dim, counts, heads, prompts)
        options = dict(
            ffn_ratio=number("ffn_expansion_factor", ffn_expansion_factor), ssm_ratio=number("ssm_ratio", ssm_ratio)
        )
        factory = dict(device=device, dtype=dtype)
        dims = [dim, 2 * dim, 4 * dim, 8 * dim]

        def blocks(width: int, heads: int, count: int, dual: bool) -> nn.Sequential:
            dual = dual or dual_at_high_res
            return nn.Sequential(*(Block(width, heads, dual=dual, **options, **factory) for _ in range(count)))

        self.patch_embed = _Embed(in_chans, dim, **factory)
        for index, (width, (channels, size)) in enumerate(zip(dims, prompts), 1):
            self.add_module(f"prompt{index}", PromptBlock(width, channels, size, **factory))
        self.encoder_level1 = blocks(dims[0], heads[0], counts[0], dual=False)
        self.down1_2 = _Resampled(dims[0], up=False, **factory)
        self.encoder_level2 = blocks(dims[1], heads[1], counts[1], dual=False)
        self.down2_3 = _Resampled(dims[1], up=False, **factory)
        self.encoder_level3 = blocks(dims[2], heads[2], counts[2], dual=True)
        self.down3_4 = _Resampled(dims[2], up=False, **factory)
        self.latent = blocks(dims[3], heads[3], counts[3], dual=True)
        self.up4_3 = _Resampled(dims[3], up=True, **factory)
        self.reduce_chan_level3 = _conv(dims[3], dims[2], **factory)
        self.decoder_level3 = blocks(dims[2], heads[2], counts[2], dual=True)
        self.up3_2 = _Resampled(dims[2], up=True, **factory)
        self.reduce_chan_level2 = _conv(dims[2], dims[1], **factory)
        self.decoder_level2 = blocks(dims[1], heads[1], counts[1], dual=False)
        self.up2_1 = _Resampled(dims[1], up=True, **factory)
        self.decoder_level1 = blocks(dims[1], heads[0], counts[0], dual=False)
        self.refinement = blocks(dims[1], heads[0], num_refinement_blocks, dual=True)
        self.output = _conv(dims[1], in_chans, 3, **factory)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        first = self._run(self.encoder_level1, self.patch_embed(x))
        second = self._run(self.encoder_level2, self.down1_2(first))
        third = self._run(self.encoder_level3, self.down2_3(second))
        y = self.prompt4(self._run(self.latent, self.down3_4(third)))
        y = self.reduce_chan_level3(torch.cat([self.up4_3(y), self.prompt3(third)], 1))
        y = self._run(self.decoder_level3, y)
        y = self.reduce_chan_level2(torch.cat([self.up3_2(y), self.prompt2(second)], 1))
        y = self._run(self.decoder_level2, y)
        y = self._run(self.decoder_level1, torch.cat([self.up2_1(y), self.prompt1(first)], 1))
        return self.output(self._run(self.refinement, y)) + x

    def _run(self, blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in SS2D.no_decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the first to the last level, for layer-wise learning rate decay."""
        levels = (
            *(r"^encoder_level1|^prompt1", r"^down1_2|^encoder_level2|^prompt2", r"^down2_3|^encoder_level3|^prompt3"),
            *(r"^down3_4|^latent|^prompt4", r"^up4_3|^reduce_chan_level3|^decoder_level3"),
            *(r"^up3_2|^reduce_chan_level2|^decoder_level2", r"^up2_1|^decoder_level1", r"^refinement|^output"),
        )
        return dict(stem=r"^patch_embed", blocks=[(level, (index,)) for index, level in enumerate(levels)])


def _check(dim: int, counts: tuple[int, ...], heads: tuple[int, ...], prompts: tuple[tuple[int, int], ...]) -> None:
    if whole("dim", dim) < 4 or dim % 4:
        raise InputError(f"dim must be a multiple of 4, which the prompts' attention has as heads, got {dim}")
    for name, values in (("num_blocks", counts), ("heads", heads), ("prompt_dims and prompt_sizes", prompts)):
        if len(values) != 4:
            raise InputError(f"{name} must have a value for each of 4 levels, got {len(values)}")
    if min(counts) < 1 or min(min(pair) for pair in prompts) < 1:
        raise InputError("num_blocks, prompt_dims and prompt_sizes must be at least 1")
    for level, count in enumerate(heads):
        if count < 1 or (dim * 2**level) % count:
            raise InputError(f"heads must divide the channels of each level, got {count} for {dim * 2**level}")


_UNUSED = re.compile(r"^(chnl_reduce\d|reduce_noise_channel_\d)\.")


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the authors' class, without the convolutions that their forward pass never uses.

    Their prompts have five axes, the first of length 1; here they have four, because `model.to(memory_format=
    torch.channels_last)` takes no others.
    """
    return {
        name: value[0] if name.endswith("prompt_param") and value.ndim == 5 else value
        for name, value in state_dict.items()
        if not _UNUSED.search(name)
    }


default_cfgs = generate_default_cfgs(
    {
        "mtair": restoration_cfg(
            size=128,
            origin_url="https://github.com/12138-chr/MTAIR",
            license="unstated",
            paper_name="Multi-dimensional Visual Prompt Enhanced Image Restoration via Mamba-Transformer Aggregation",
            paper_ids="arXiv:2412.15845",
            first_conv="patch_embed.proj",
            description=RECONSTRUCTED,
        )
    }
)


register_variants(__name__, MTAIR, {"mtair": dict()})

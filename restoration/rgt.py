"""RGT and RGT-S: super-resolution by local attention in rectangular windows and global attention to a summary.

Paper: Recursive Generalization Transformer for Image Super-Resolution, ICLR 2024, arXiv 2303.06373.
Official code: github.com/zhengchen1999/RGT (Apache-2.0). Weights by the authors, Apache-2.0, by hand.

Where paper and code differ, this is the code. Deviations and choices:
- Names of modules are the authors'. Masks of shifted windows and indices of positions, which their files have, are
  computed for each size and not loaded; the table of offsets is loaded.
- Pictures with a side below 16, or below 4^recursions, are reflected at the right and the bottom border up to it;
  the official code fails. It also fails for elongated pictures (16 x 1024), which here have fewer recursions.
- The number of recursions depends on the size and, in the official code, on training or evaluation: `recursions`
  fixes it.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from timm.models._manipulate import checkpoint
from torch import nn
from torchvision.ops import Permute

from terrazzo.backbones._checks import number, whole, wholes
from terrazzo.backbones._layers import init_linear, on_maps
from terrazzo.backbones._rectangles import WindowBias, rectangle_attention
from terrazzo.backbones._recursion import Generalization, recursions_of
from terrazzo.backbones._weights import any_prefix
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.exporting import is_exporting, is_open
from terrazzo.restoration._model import RestorationModel
from terrazzo.restoration._registration import register_variants, restoration_cfg

__all__ = ["RGT"]

MEAN = (0.4488, 0.4371, 0.4040)
"""Of the channels of DIV2K's training pictures."""


class LocalAttention(nn.Module):
    """L-SA: half of the heads attend in wide windows, and half in high windows; values are convolved, too.

    (B, H, W, C) to (B, H, W, C). The map is filled with zeros to multiples of the windows' longer side. Tokens of the
    filling take part in the softmax, as in the authors' code.

    Source: arXiv 2303.06373, section 3.
    """

    def __init__(self, dim: int, heads: int, split: tuple[int, int], shifted: bool, **factory):
        """Args:
        split: Rows and columns of the first windows; the others have them exchanged.
        shifted: Whether windows are shifted by half their sides.
        """
        super().__init__()
        self.heads, self.shifted = heads, shifted
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.attns = nn.ModuleList(
            WindowBias(window, heads // 2, dim // 2 // 4, **factory) for window in (split, split[::-1])
        )
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (height, width), multiple = x.shape[1:3], max(self.attns[0].window)
        query_key_value = self.qkv(x)
        local = on_maps(query_key_value.chunk(3, -1)[2], self.get_v)
        rows, columns = ((side + multiple - 1) // multiple * multiple for side in (height, width))
        filled = F.pad(query_key_value, (0, 0, 0, columns - width, 0, rows - height))
        parts = filled.unflatten(3, (3, self.heads, -1)).unbind(3)  # B H W heads D
        halves = zip(*(part.chunk(2, 3) for part in parts))
        out = [self._attended(half, attention) for half, attention in zip(halves, self.attns)]
        return self.proj(torch.cat(out, 3).flatten(3)[:, :height, :width] + local)

    def _attended(self, half: Sequence[torch.Tensor], attention: WindowBias) -> torch.Tensor:
        rows, columns = attention.window
        shift = (rows // 2, columns // 2) if self.shifted else (0, 0)
        return rectangle_attention(*half, attention.window, attention(), shift)


class RecursiveAttention(Generalization):
    """RG-SA: all tokens attend to a small map, made by recursions of one convolution.

    (B, H, W, C) to (B, H, W, C). The cost is 2 N N' (c + C) for the N' tokens of the small map, at most 63^2.

    Source: arXiv 2303.06373, section 3.
    """

    def __init__(self, dim: int, heads: int, ratio: float = 0.5, **factory):
        """Args:
        ratio: c / C, of channels of queries and keys to all channels.
        """
        width = int(dim * ratio)
        super().__init__(dim, width, **factory)
        self.heads = heads
        self.q = nn.Linear(dim, width, **factory)
        self.k = nn.Linear(width, width, **factory)
        self.v = nn.Linear(width, dim, **factory)
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: torch.Tensor, recursions: int | None = None) -> torch.Tensor:
        """Args:
        recursions: None for the authors' rule.
        """
        grid = tuple(x.shape[1:3])
        times = recursions_of(grid, self.training) if recursions is None else recursions
        z, small = self.summary(x, times)
        value = self.v(z).unflatten(1, small)
        value = (value + on_maps(value, self.cpe)).flatten(1, 2)
        query, key, value = (self._heads(y) for y in (self.q(x.flatten(1, 2)), self.k(z), value))
        out = _cross_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # B heads N D


def _cross_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(s q k^T) v for values with more channels than queries and keys.

    PyTorch's attention without N x N' weights needs equal channels on a CPU: queries and keys are filled with zeros.
    """
    scale, missing = query.shape[3] ** -0.5, value.shape[3] - query.shape[3]
    if missing > 0 and query.device.type == "cpu":
        query, key = (F.pad(x, (0, missing)) for x in (query, key))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


class SpatialGate(nn.Module):
    """x1 times the convolution of normalised x2, for the halves of the channels: (B, H, W, 2 C) to (B, H, W, C)."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = x.chunk(2, -1)
        return x * on_maps(self.norm(gate), self.conv)


class GatedMlp(nn.Module):
    """An MLP with a spatial gate: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, **factory):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.act = nn.GELU()
        self.sg = SpatialGate(hidden // 2, **factory)
        self.fc2 = nn.Linear(hidden // 2, dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.sg(self.act(self.fc1(x))))


class Block(nn.Module):
    """Attention and a gated MLP, each with a residual, and the scaled input of the block in addition (HAI).

    Source: arXiv 2303.06373, section 3, hybrid adaptive integration.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, **factory):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-4, **factory))
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio), **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor, recursions: int | None = None) -> torch.Tensor:
        y = self.norm1(x)
        y = self.attn(y) if isinstance(self.attn, LocalAttention) else self.attn(y, recursions)
        y = x + self.drop_path(y)
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return y + self.gamma * x


class ResidualGroup(nn.Module):
    """Blocks, then a convolution, and the input of the group in addition: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, blocks: Sequence[Block], connection: str, **factory):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.conv = _connection(dim, connection, **factory)

    def forward(self, x: torch.Tensor, recursions: int | None = None, again: bool = False) -> torch.Tensor:
        """Args:
        recursions: Of the blocks with global attention; None for the authors' rule.
        again: Checkpoint: the backward pass computes the blocks again.
        """
        y = x
        for block in self.blocks:
            y = checkpoint(block, y, recursions) if again else block(y, recursions)
        return x + on_maps(y, self.conv)


def _connection(dim: int, kind: str, **factory) -> nn.Module:
    """The convolution after blocks: one of 3 x 3, or three with fewer channels between."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1, **factory)
    inner = dim // 4
    return nn.Sequential(
        nn.Conv2d(dim, inner, 3, padding=1, **factory),
        nn.LeakyReLU(0.2),
        nn.Conv2d(inner, inner, 1, **factory),
        nn.LeakyReLU(0.2),
        nn.Conv2d(inner, dim, 3, padding=1, **factory),
    )


class RGT(RestorationModel):
    """Recursive Generalization Transformer: (B, 3, H, W) in [0, 1] to (B, 3, upscale H, upscale W).

    Attributes:
        recursions: T, how often global attention reduces the map by 4; None for the authors' rule, which depends on the
            size, and on training or evaluation. It may be set at any time.
    """

    tasks = ("super-resolution",)

    def __init__(
        self,
        upscale: int = 2,
        in_chans: int = 3,
        depth: Sequence[int] = (6, 6, 6, 6, 6, 6),
        embed_dim: int = 180,
        num_heads: int = 6,
        mlp_ratio: float = 2.0,
        split_size: tuple[int, int] = (8, 32),
        c_ratio: float = 0.5,
        resi_connection: str = "1conv",
        img_range: float = 1.0,
        recursions: int | None = None,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        upscale: 2, 3 or 4.
        depth: Blocks of each residual group; even blocks are local, odd blocks global.
        embed_dim, num_heads: Channels and heads of all blocks; an even number of heads.
        split_size: Rows and columns of wide windows; high windows have them exchanged.
        c_ratio: Channels of queries and keys of global attention, as a part of all channels.
        resi_connection: "1conv" or "3conv".
        img_range: What white is in the network; pictures are in [0, 1] at any value.
        recursions: See the attribute.

        Raises:
            InputError: An argument is not valid.
        """
        super().__init__(whole("upscale", upscale), whole("in_chans", in_chans))
        depth, split_size = wholes("depth", depth), wholes("split_size", split_size)
        _check(self.upscale, depth, embed_dim, num_heads, split_size, c_ratio, mlp_ratio, resi_connection)
        if recursions is not None and whole("recursions", recursions) < 1:
            raise InputError(f"recursions must be 1 or more, or None for the authors' rule, got {recursions}")
        self.recursions = recursions
        self.img_range = number("img_range", img_range)
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depth))
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1, **factory)
        self.before_RG = nn.Sequential(Permute([0, 2, 3, 1]), nn.LayerNorm(embed_dim, **factory))
        self.layers = nn.ModuleList()
        for group, count in enumerate(depth):
            blocks = []
            for i in range(count):
                if i % 2 == 0:
                    attention = LocalAttention(embed_dim, num_heads, split_size, _is_shifted(group, i), **factory)
                else:
                    attention = RecursiveAttention(embed_dim, num_heads, c_ratio, **factory)
                blocks.append(Block(embed_dim, attention, mlp_ratio, rates[sum(depth[:group]) + i], **factory))
            self.layers.append(ResidualGroup(embed_dim, blocks, resi_connection, **factory))
        self.norm = nn.LayerNorm(embed_dim, **factory)
        self.conv_after_body = _connection(embed_dim, resi_connection, **factory)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, 64, 3, padding=1, **factory), nn.LeakyReLU())
        self.upsample = _upsample(self.upscale, 64, **factory)
        self.conv_last = nn.Conv2d(64, in_chans, 3, padding=1, **factory)
        self.apply(init_linear)

    def least_side(self) -> int:
        return 4 ** (2 if self.recursions is None else self.recursions)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        if self.recursions is None and is_exporting() and any(is_open(side) for side in x.shape[2:]):
            raise InputError(
                "RGT reduces maps more often for larger pictures, so its exports have one size; for open sizes fix the "
                "number, create_model(name, recursions=2), or model.backbone.recursions=2 in a config of Restorer"
            )
        mean = self._mean(x)
        shallow = self.conv_first((x - mean) * self.img_range)
        y = self.before_RG(shallow)
        for group in self.layers:
            y = group(y, self.recursions, self.grad_checkpointing)
        y = self.conv_after_body(self.norm(y).permute(0, 3, 1, 2)) + shallow
        y = self.conv_last(self.upsample(self.conv_before_upsample(y)))
        return y / self.img_range + mean

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean colour, rounded to float32; 0 for pictures that are not RGB, as in the authors' code."""
        mean = MEAN if self.in_chans == 3 else (0.0,) * self.in_chans
        return torch.tensor(mean, dtype=torch.float32, device=x.device).to(x.dtype)[:, None, None]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the first to the last layer, for layer-wise learning rate decay."""
        groups = [(r"^layers\.(\d+)", None)]
        blocks = [] if coarse else [(r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^conv_first|^before_RG", blocks=[*blocks, *groups])


def _upsample(upscale: int, channels: int, **factory) -> nn.Sequential:
    """Convolutions and pixel shuffles that enlarge a map."""
    factors = (2, 2) if upscale == 4 else (upscale,)
    steps = []
    for factor in factors:
        steps += [nn.Conv2d(channels, factor**2 * channels, 3, padding=1, **factory), nn.PixelShuffle(factor)]
    return nn.Sequential(*steps)


def _is_shifted(group: int, block: int) -> bool:
    """Whether a local block has shifted windows: every second local block of the network."""
    return block % 4 == (2 if group % 2 == 0 else 0)


def _check(
    upscale: int,
    depth: tuple[int, ...],
    dim: int,
    heads: int,
    split: tuple[int, ...],
    ratio: float,
    mlp_ratio: float,
    connection: str,
) -> None:
    if upscale not in (2, 3, 4):
        raise InputError(f"upscale must be 2, 3 or 4, got {upscale}")
    if not depth or min(depth) < 1:
        raise InputError(f"depth must be the number of blocks of each group, such as (6, 6), got {depth}")
    dim, heads = whole("embed_dim", dim), whole("num_heads", heads)
    if heads < 2 or heads % 2 or dim % heads:
        raise InputError(f"num_heads must be even and divide embed_dim {dim}, got {heads}")
    if len(split) != 2 or min(split) < 2 or max(split) % min(split):
        raise InputError(f"split_size must be two sides of which one divides the other, such as (8, 32), got {split}")
    width = int(dim * number("c_ratio", ratio))
    if width < heads or width % heads:
        raise InputError(f"c_ratio times embed_dim {dim} must be a multiple of num_heads {heads}, got {ratio}")
    if int(dim * number("mlp_ratio", mlp_ratio)) < 2 or int(dim * mlp_ratio) % 2:
        raise InputError(f"mlp_ratio times embed_dim {dim} must be an even number, got {mlp_ratio}")
    if connection not in ("1conv", "3conv"):
        raise InputError(f"resi_connection must be '1conv' or '3conv', got {connection!r}")


_COMPUTED = re.compile(r"\.(attn_mask_[01]|relative_position_index)$")
"""Tensors of the authors' files that are computed here for the size of the picture."""


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' state dict, which has the same names, without masks and indices.

    Offsets of positions that a file lacks are the model's own.
    """
    offsets = {name: value for name, value in model.state_dict().items() if name.endswith(".rpe_biases")}
    return offsets | {name: value for name, value in state_dict.items() if not _COMPUTED.search(name)}


def _cfg(model: str) -> dict[str, Any]:
    return restoration_cfg(
        origin_url="https://github.com/zhengchen1999/RGT",
        license="apache-2.0",
        paper_name="Recursive Generalization Transformer for Image Super-Resolution",
        paper_ids="arXiv:2303.06373",
        first_conv="conv_first",
        description=f"the authors' file {model}.pth loads, downloaded by hand",
    )


default_cfgs = generate_default_cfgs(
    {
        f"{name}_x{scale}": _cfg(f"{file}_x{scale}")
        for name, file in (("rgt_s", "RGT_S"), ("rgt", "RGT"))
        for scale in (2, 3, 4)
    }
)


register_variants(
    __name__,
    RGT,
    {
        f"{name}_x{scale}": dict(upscale=scale, depth=(6,) * groups)
        for name, groups in (("rgt_s", 6), ("rgt", 8))
        for scale in (2, 3, 4)
    },
)

"""RoMA: ARM's plain Mamba backbone, which scans a sequence in four directions, with the class token in its middle.

Papers:
    RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing, NeurIPS 2025, arXiv 2503.10392.
    Autoregressive Pretraining with Mamba in Vision (ARM), ICLR 2025, arXiv 2406.07537: the architecture.
Official code: github.com/MiliLab/RoMA and github.com/OliverRensu/ARM; licences unstated. Pretraining weights by the
authors, for base and large: hub initiacms/RoMA; licence unstated.

The authors' tiny and small have different widths for pretraining (192, 384) and fine-tuning (384, 512), so their code
cannot fine-tune their pretrained models. Here they have the widths of fine-tuning, and no weights. The gate is the same
for all four directions up to their order, so it acts once, on their sum; the causal convolutions run in scan order.

Deviations without effect at the size that a model is built for: images of any size are zero-padded at the right and
bottom to whole patches, and the position embedding is resized bicubically. The mean over an odd number of patches
(`global_pool="avg"`) weighs all patches equally; the authors average the means of two unequal halves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SwiGLU, lecun_normal_, trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._bare import on_sequences, step_sizes
from terrazzo.backbones._checks import sides
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import initial_step_bias, patch_conv, resized, whole_patches
from terrazzo.backbones._plain import Plain
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Beside, needed
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, rename, take_old_names
from terrazzo.errors import InputError
from terrazzo.kernels import selective_scan

__all__ = ["RoMA"]

STATE = 16  # numbers of state per channel
KERNEL = 4  # kernel size of the causal convolution
DIRECTIONS = ("", "_b", "_c", "_c_b")  # the authors' suffixes: by rows, reversed, by columns, reversed


class Grid(Beside):
    """The order of a map's pixels (height, width) in sequences by rows and by columns, with a token in the middle.

    The order is stored as index tensors, not computed by slices: tracing for symbolic sizes is many times faster.

    Attributes:
        columns: (L,), indices that reorder a sequence by rows to a sequence by columns; the token stays in the middle.
        rows: (L,), the inverse.
    """

    height: int = 0
    width: int = 0
    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, height: int, width: int, device: torch.device) -> "Grid":
        columns, rows = _by_columns(height, width, device), _by_columns(width, height, device)
        return cls(height=height, width=width, columns=columns, rows=rows)


def _by_columns(height: int, width: int, device: torch.device) -> torch.Tensor:
    middle = height * width // 2
    patch = torch.arange(height * width, device=device).unflatten(0, (height, width)).t().flatten()
    patch = patch + (patch >= middle).long()
    return torch.cat([patch, torch.arange(1, device=device) + middle]).index_select(
        0, _insertion(patch.shape[0], device)
    )


def _insertion(count: int, device: torch.device) -> torch.Tensor:
    """Indices that move a token from behind `count` patches to their middle."""
    place = torch.arange(count + 1, device=device)
    return torch.where(place == count // 2, count, place - (place > count // 2).long())


def with_token(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Insert a token (B, 1, C) into patches (B, M, C) at M // 2: (B, M + 1, C)."""
    return torch.cat([x, token], 1).index_select(1, _insertion(x.shape[1], x.device))


def without_token(x: torch.Tensor) -> torch.Tensor:
    """The patches (B, M, C) of a sequence (B, M + 1, C) with a token in the middle."""
    place = torch.arange(x.shape[1] - 1, device=x.device)
    return x.index_select(1, place + (place >= (x.shape[1] - 1) // 2).long())


def middle_token(x: torch.Tensor) -> torch.Tensor:
    """The token (B, C) in the middle of a sequence (B, M + 1, C)."""
    return x[:, (x.shape[1] - 1) // 2]


class Scan(nn.Module):
    """The parameters of one direction: the convolution, and the inputs of the selective scan."""

    def __init__(self, dim: int, **factory):
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.conv1d = nn.Conv1d(dim, dim, KERNEL, groups=dim, **factory)
        self.x_proj = nn.Linear(dim, self.rank + 2 * STATE, bias=False, **factory)
        self.dt_proj = nn.Linear(self.rank, dim, **factory)
        self.A_log = nn.Parameter(torch.empty(dim, STATE, **factory))
        self.D = nn.Parameter(torch.empty(dim, **factory))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs of the selective scan, from a sequence (B, L, C) in scan order.

        Returns:
            u and delta (B, L, C), A (C, STATE), B and C (B, L, STATE), D (C,) and the bias of delta (C,).
        """
        u = F.silu(on_sequences(F.pad(x, (0, 0, KERNEL - 1, 0)), self.conv1d))
        delta, B, C = self.x_proj(u).split([self.rank, STATE, STATE], -1)
        delta, bias = step_sizes(self.dt_proj, delta)
        # All parameters are read here, and no parameter is returned: a sharded module has them only while it runs.
        return u, delta, -torch.exp(self.A_log), B, C, self.D.clone(), bias

    def reset_parameters(self) -> None:
        """Mamba's initialisation: decays 1 to STATE, steps between 0.001 and 0.1 (arXiv 2312.00752, section 3.6)."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, STATE + 1, device=self.A_log.device).log().expand_as(self.A_log))
            self.D.fill_(1)
            nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
            bias = self.dt_proj.bias
            bias.copy_(initial_step_bias(*bias.shape, device=bias.device, dtype=bias.dtype))


class Mixer(nn.Module):
    """Mamba on (B, H W + 1, C); with a single direction, on any sequence.

    Source: ARM, arXiv 2406.07537, section 3.2, and its code's "v3".
    """

    def __init__(self, dim: int, directions: int, **factory):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **factory)
        self.scans = nn.ModuleList(Scan(dim, **factory) for _ in range(directions))
        self.proj_out = nn.Linear(dim, dim, bias=False, **factory)
        self.register_load_state_dict_pre_hook(take_old_names)

    def forward(self, x: torch.Tensor, grid: Any = None) -> torch.Tensor:
        """Args:
        grid: The `Grid` of the sequence; a single direction does not need it.
        """
        x, gate = self.in_proj(x).chunk(2, -1)
        if len(self.scans) == 1:
            (y,) = self._scan([x])
        else:
            grid = needed(grid, self)
            columns = x.index_select(1, grid.columns)
            row, row_back, column, column_back = self._scan([x, x.flip(1), columns, columns.flip(1)])
            y = row + row_back.flip(1) + (column + column_back.flip(1)).index_select(1, grid.rows)
        return self.proj_out(y * (F.silu(gate) / len(self.scans)))

    def _scan(self, sequences: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Scan sequences (B, L, C), one for each direction, as groups of channels of one call."""
        u, delta, A, B, C, D, bias = zip(*(scan(x) for scan, x in zip(self.scans, sequences)))
        y = selective_scan(
            torch.cat(u, -1).transpose(1, 2),  # B directions*C L
            torch.cat(delta, -1).transpose(1, 2),
            torch.cat(A),
            torch.stack(B, 1).transpose(2, 3),  # B directions STATE L
            torch.stack(C, 1).transpose(2, 3),
            torch.cat(D),
            delta_bias=torch.cat(bias),
            delta_softplus=True,
        )
        return y.transpose(1, 2).chunk(len(self.scans), -1)


class Block(nn.Module):
    """Pre-norm mixer and SwiGLU on a sequence (B, L, C). The state is its grid; None for a single direction."""

    def __init__(self, dim: int, directions: int, drop_path: float, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.mixer = Mixer(dim, directions, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = SwiGLU(dim, dim * 8 // 3, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, grid: Any = None) -> torch.Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_positions(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize position embeddings of a square map, (1, M, C), bicubically to another size; unchanged for the same size.

    Computed by matrix products (`_layers.resized`).
    """
    side = math.isqrt(x.shape[1])
    if not torch.compiler.is_compiling() and tuple(size) == (side, side):
        return x
    return resized(x.unflatten(1, (side, side)), size).flatten(1, 2)


def init_patches(proj: nn.Conv2d) -> None:
    lecun_normal_(proj.weight)
    nn.init.zeros_(proj.bias)


class Stem(nn.Module):
    """Patches with the class token in the middle and position embeddings: (B, in_chans, H, W) to (B, M + 1, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, img_size: int, **factory):
        super().__init__()
        self.patch_size = patch_size
        self.proj = patch_conv(in_chans, dim, patch_size, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, math.ceil(img_size / patch_size) ** 2 + 1, dim, **factory))

    def forward(self, x: torch.Tensor, grid: Any = None) -> torch.Tensor:
        """Args:
        grid: A `Grid`, which becomes the grid of the patches; None for no grid.
        """
        x = self.proj(whole_patches(x, self.patch_size))
        if grid is not None:
            grid.become(Grid.of(*x.shape[2:], x.device))
        positions = resize_positions(without_token(self.pos_embed), tuple(x.shape[2:]))
        token = self.cls_token + middle_token(self.pos_embed)
        return with_token(x.flatten(2).transpose(1, 2) + positions, token.expand(x.shape[0], -1, -1))

    def reset_parameters(self) -> None:
        init_patches(self.proj)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)


class MiddleTokenHead(TokenHead):
    """A classifier of sequences (B, M + 1, C) with the class token in the middle."""

    class_token = staticmethod(middle_token)
    positions = staticmethod(without_token)

    def _fit(self, num_classes: int, pool_type: str, **factory) -> None:
        super()._fit(num_classes, pool_type, **factory)
        if num_classes > 0:
            trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)


def init_blocks(blocks: Sequence[Block]) -> None:
    """The authors' initialisation: PyTorch's, with zero biases; mixers' last projections shrink with the depth."""
    for block in blocks:
        for part in block.modules():
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        with torch.no_grad():
            block.mixer.proj_out.weight /= math.sqrt(len(blocks))
        for scan in block.mixer.scans:
            scan.reset_parameters()


class RoMA(Plain):
    """Patches of 16 pixels, then blocks of Mamba and SwiGLU of one width.

    `forward_features` returns the head's input, the normalised sequence (B, M + 1, C) with the class token at M // 2.
    Features are maps, without the token.
    """

    no_decay = ("A_log", "D", "cls_token", "pos_embed")
    gives_tokens = True

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        img_size: side of the images, squares, that the position embedding is made for; for other images it is resized.
        global_pool: "token" for the class token; timm's other poolings take the patches.
        norm_outputs: see `Backbone`. The authors' segmentors have a single norm, for the last block's map.
        """
        factory = dict(device=device, dtype=dtype)
        height, width = sides("img_size", img_size)
        if height != width:
            raise InputError(f"img_size must be a square, because positions are resized as squares, got {img_size}")
        # The authors shift the rates by one block, and so drop fewer paths than they state.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        options = dict(in_chans=in_chans, num_classes=num_classes, global_pool="avg", drop_rate=drop_rate)
        super().__init__(
            Stem(in_chans, embed_dim, patch_size, height, **factory),
            [Block(embed_dim, len(DIRECTIONS), rates[i], **factory) for i in range(depth)],
            embed_dim,
            patch_size,
            norm_layer=nn.LayerNorm,
            norm_outputs=norm_outputs,
            **options,
            **factory,
        )
        self.head = MiddleTokenHead(embed_dim, num_classes, global_pool, drop_rate, **factory)
        init_blocks(self.blocks)
        self.stem.reset_parameters()

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        grid = Grid()
        return self.stem(x, grid), grid

    def to_map(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return without_token(x).unflatten(1, (state.height, state.width))

    def to_features(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return self.norm(x)


def _of_directions() -> list[tuple[str, str]]:
    """Pairs that turn the authors' names, which contain the direction, into names with a module for each direction."""
    pairs = []
    for i, suffix in enumerate(DIRECTIONS):
        pairs += [
            (rf"\.mixer\.(conv1d|x_proj|dt_proj){suffix}\.", rf".mixer.scans.{i}.\1."),
            (rf"\.mixer\.A{suffix}_log$", f".mixer.scans.{i}.A_log"),
            (rf"\.mixer\.D{suffix}$", f".mixer.scans.{i}.D"),
        ]
    return pairs


# From the authors' names to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^(cls_token|pos_embed)$", r"stem.\1"),
    (r"^layers\.", "blocks."),
    *_of_directions(),
    LAST_PROJECTION,
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^norm_f\.", "norm."),
    (r"^head\.(?=weight|bias)", "head.fc."),
]
# Tensors that a pretraining checkpoint lacks, and tensors that fine-tuning does not take: the decoder.
NEW_NAMES = re.compile(r"^(stem\.cls_token$|norm\d*\.|head\.)")
DECODER_NAMES = re.compile(
    r"^(angle_embed|ar_token|dec_pos_embed|mask)$|^(enc2dec|dec_block|norm_\d|ar_norm|ar_pred|decoder)\."
)


def _from_pretraining(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an encoder of one direction, without a class token, into a state dict of `model`.

    All directions begin with its weights; the class token's position is zero; norm, token and classifier stay the
    model's.
    """
    out = {name: value for name, value in model.state_dict().items() if NEW_NAMES.match(name)}
    for name, value in state_dict.items():
        if ".scans.0." in name:
            out |= {name.replace(".scans.0.", f".scans.{i}."): value for i in range(len(DIRECTIONS))}
        elif not DECODER_NAMES.match(name):
            out[name] = value
    positions = out["stem.pos_embed"]
    out["stem.pos_embed"] = with_token(positions, torch.zeros_like(positions[:, :1]))
    return out


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or a checkpoint of `RoMAPretraining`, into a state dict of `model`.

    It takes the authors' classifiers, their segmentors' backbones, and pretraining checkpoints. The single norm of a
    segmentor becomes the norm of the last map if the model has `norm_outputs`; its pyramid is a neck here
    (`PlainPyramid`). A position embedding of another size is resized.
    """
    state_dict = rename(state_dict, OFFICIAL_NAMES)
    if not any(".scans.1." in name for name in state_dict):
        state_dict = _from_pretraining(state_dict, model)
    state_dict = {name: value for name, value in state_dict.items() if not re.match(r"fpn\d\.", name)}
    if getattr(model, "norm_outputs", False):
        last = f"norm{len(model.blocks) - 1}."
        state_dict = rename(state_dict, [(r"^norm\.", last)])
    positions, wanted = state_dict["stem.pos_embed"], math.isqrt(model.stem.pos_embed.shape[1] - 1)
    if positions.shape[1] != wanted**2 + 1:
        patches = resize_positions(without_token(positions), (wanted, wanted))
        state_dict["stem.pos_embed"] = with_token(patches, middle_token(positions).unsqueeze(1))
    return state_dict


def _cfg(weights: str, *notes: str, license: str | None = "unstated") -> dict[str, Any]:
    return imagenet_cfg(
        None,
        pool_size=(14, 14),
        first_conv="stem.proj",
        license=license,
        origin_url="https://github.com/MiliLab/RoMA",
        paper_name="RoMA: Scaling up Mamba-based Foundation Models for Remote Sensing",
        paper_ids="arXiv:2503.10392",
        description=weights,
        notes=("published top-1: none on ImageNet", *notes),
    )


_BY_HAND = "pretraining weights must be fetched by hand from https://huggingface.co/initiacms/RoMA (for 192x192 images)"
_NONE = "no public weights fit: under this name, the authors' code pretrains and fine-tunes different widths"

default_cfgs = generate_default_cfgs(
    {
        "roma_tiny": _cfg(_NONE, license=None),
        "roma_small": _cfg(_NONE, license=None),
        "roma_base": _cfg(_BY_HAND, "published linear probes: AID 87.36, UCM 59.45 % (with half of the data)"),
        "roma_large": _cfg(_BY_HAND),
    }
)


def _thirds(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The last block of each third."""
    return tuple(arguments["depth"] * i // 3 - 1 for i in (1, 2, 3))


register_variants(
    __name__,
    RoMA,
    {
        "roma_tiny": dict(embed_dim=384, depth=12),
        "roma_small": dict(embed_dim=512, depth=12),
        "roma_base": dict(embed_dim=768, depth=12),
        "roma_large": dict(embed_dim=1024, depth=24),
    },
    out_indices=_thirds,
)

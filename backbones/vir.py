"""ViR: a ViT whose attention is retention, without softmax, with weights that decay with the distance of tokens.

Paper: ViR: Vision Retention Networks, 2023, arXiv 2310.19731; its second version is called ViR: Towards Efficient
    Vision Retention Backbones.
Official code: github.com/NVlabs/ViR has no code. The authors released the isotropic models for review, without a
licence: names, sizes and formulas follow this release, and no line is copied. There are no weights.

From the authors' release: the isotropic models, retention on sequences, and the decay of retention on maps. From the
paper: a hybrid has convolutions in its first stages and retention in its last. Our choices, because no source states
them: four directions for dense features, and all sizes and layers of the hybrids, which are our own models.

Deviation with an effect: the authors' forward pass applies a softmax over all tokens to the masked products, so that
it is neither causal nor equal to their recurrent mode. Here all forms are equal to the recurrent mode;
`parallel_softmax=True` gives the authors' forward pass. Deviations without effect at the size that a model is built
for: images of any size are zero-padded at the right and bottom to whole patches, and the position embedding is resized
bicubically.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._checks import sides
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import init_linear, patch_conv, resized, whole_patches
from terrazzo.backbones._place import Place
from terrazzo.backbones._plain import Plain
from terrazzo.backbones._pyramid import Pyramid, Stage
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Grid, needed
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, rename, take_old_names
from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.backbones.mixers.retention import decays
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast

__all__ = ["ViR", "ViRHybrid"]

_norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Retention(nn.Module):
    """Retention between two projections, on tokens (B, N, C): patches in raster order, then the class token.

    There are no gates, no norms and no positions, unlike in RetNet. The mixer `retention` holds the formula and its
    three forms. Source: arXiv 2310.19731, section 3; names follow the authors' code.
    """

    def __init__(self, dim: int, heads: int, parallel_softmax: bool, retention: dict[str, Any], **factory):
        """Args:
        retention: Options of the mixer `retention`.
        """
        super().__init__()
        self.heads, self.parallel_softmax = heads, parallel_softmax
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.proj_out = nn.Linear(dim, dim, **factory)
        self.register_load_state_dict_pre_hook(take_old_names)
        self.mixer = create_mixer("retention", Host(dim, heads, dim // heads), **retention)
        self.needs_grid = self.mixer.dims == 2 or self.mixer.directions > 1
        if parallel_softmax and self.needs_grid:
            raise InputError(
                "parallel_softmax works with dims=1 and directions=1 only, got "
                f"dims={self.mixer.dims} and directions={self.mixer.directions}"
            )

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Args:
        grid: Rows and columns of the patches; None for a sequence in one direction, which needs no grid.
        """
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B heads N D
        if self.parallel_softmax:
            out = masked_softmax(query, key, value)
        else:
            out = self.mixer(query, key, value, Place(grid or (x.shape[1], 1)))  # a sequence alone is a column
        return self.proj_out(out.transpose(1, 2).flatten(2))


def masked_softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The authors' parallel mode on (B, heads, N, D): a token that comes later has the logit 0, so it is not hidden."""
    steps = torch.arange(query.shape[2], device=query.device)
    with without_autocast(value):
        query, key = (x.to(accumulator(x)) for x in (query, key))
        decay = decays(query.shape[1], query)[:, None, None]
        weights = (decay * (steps[:, None] - steps).clamp(min=0)).exp().tril()
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3) * weights
        return logits.softmax(-1).to(value.dtype) @ value


class Block(nn.Module):
    """Pre-norm retention and MLP with layer scales, on tokens (B, N, C).

    The state is a `Grid`. Retention of a sequence in one direction needs no state.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        drop_path: float,
        parallel_softmax: bool = False,
        init_values: float = 1e-5,
        retention: dict[str, Any] | None = None,
        **factory,
    ):
        super().__init__()
        self.norm1 = _norm_layer(dim, **factory)
        self.retention = Retention(dim, heads, parallel_softmax, retention or {}, **factory)
        self.ls1 = LayerScale(dim, init_values, **factory)
        self.norm2 = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)
        self.ls2 = LayerScale(dim, init_values, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        return self.on_grid(x, needed(state, self).grid if self.retention.needs_grid else None)

    def on_grid(self, x: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        x = x + self.drop_path(self.ls1(self.retention(self.norm1(x), grid)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class MapBlock(Block):
    """The block on a map (B, C, H, W), without a class token."""

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        grid = tuple(x.shape[2:])
        return self.on_grid(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid)


class Stem(nn.Module):
    """Patches with position embeddings, then the class token, which has none: (B, in_chans, H, W) to (B, N + 1, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, img_size: tuple[int, int], **factory):
        super().__init__()
        self.patch_size = patch_size
        self.grid = tuple(-(-side // patch_size) for side in img_size)
        self.proj = patch_conv(in_chans, dim, patch_size, **factory)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim, **factory))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        """Args:
        state: A `Grid`, which gets the grid of the patches; None for no state.
        """
        x = self.proj(whole_patches(x, self.patch_size))
        grid = tuple(x.shape[2:])
        if state is not None:
            state.grid = grid
        x = x.flatten(2).transpose(1, 2) + self.positions(grid)
        return torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The positions of a grid, (1, H W, C), resized as timm resizes, by matrix products."""
        if not torch.compiler.is_compiling() and grid == self.grid:
            return self.pos_embed
        return resized(self.pos_embed.unflatten(1, self.grid), grid, antialias=True).flatten(1, 2)


class LastTokenHead(TokenHead):
    """A classifier of sequences (B, N + 1, C) with the class token at the end."""

    @staticmethod
    def class_token(x: torch.Tensor) -> torch.Tensor:
        return x[:, -1]

    @staticmethod
    def positions(x: torch.Tensor) -> torch.Tensor:
        return x[:, :-1]


class ViR(Plain):
    """Isotropic ViR: a ViT in which retention replaces attention.

    `forward_features` returns the head's input, the normalised sequence (B, N + 1, C) with the class token last.
    Features are maps, without the token. No patch sees the class token, so it has no effect on features.
    """

    no_decay = ("cls_token", "pos_embed")
    gives_tokens = True

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        dims: int = 1,
        directions: int = 1,
        form: str = "chunked",
        chunk: int | None = None,
        parallel_softmax: bool = False,
        init_values: float = 1e-5,
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
        img_size: Side of the images (or height and width) that the position embedding is made for; for other images it
            is resized.
        dims, directions, form, chunk: Options of `terrazzo.backbones.mixers.retention.Retention`. The defaults are the
            authors' model. With `dims=1` and one direction, patches see only what comes before in raster order; for
            dense features take `dims=2, directions=4`. Weights fit all of them.
        parallel_softmax: Compute what the authors' forward pass computes, for weights from their code. It keeps an
            N x N matrix for each head.
        init_values: Initial value of the layer scales.
        global_pool: "token" for the class token; timm's other poolings take the patches.
        norm_outputs: See `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        retention = dict(dims=dims, directions=directions, form=form, chunk=chunk)
        options = dict(in_chans=in_chans, num_classes=num_classes, global_pool="avg", drop_rate=drop_rate)
        super().__init__(
            Stem(in_chans, embed_dim, patch_size, sides("img_size", img_size), **factory),
            [Block(embed_dim, num_heads, rate, parallel_softmax, init_values, retention, **factory) for rate in rates],
            embed_dim,
            patch_size,
            norm_layer=_norm_layer,
            norm_outputs=norm_outputs,
            **options,
            **factory,
        )
        self.head = LastTokenHead(embed_dim, num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        state = Grid()
        return self.stem(x, state), state

    def to_map(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return x[:, :-1].unflatten(1, state.grid)

    def to_features(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return self.norm(x)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, GELU between them, added to their input: (B, C, H, W)."""

    def __init__(self, dim: int, drop_path: float, **factory):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **factory)
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **factory)
        self.norm2 = nn.BatchNorm2d(dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        return x + self.drop_path(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


def _halving(in_chans: int, out_chans: int, **factory) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, bias=False, **factory)


class ViRHybrid(Pyramid):
    """Two stages of convolutions, then two stages of retention on maps in four directions. The sizes are ours."""

    map_fmt = "NCHW"

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 3, 6, 5),
        num_heads: Sequence[int] = (8, 16),
        dims: int = 2,
        directions: int = 4,
        form: str = "chunked",
        chunk: int | None = None,
        init_values: float = 1e-5,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Args:
        embed_dim: Channels of the first stage; each later stage has twice as many as the stage before.
        depths: Blocks per stage.
        num_heads: Heads in the third and in the fourth stage.
        dims, directions, form, chunk: Options of `terrazzo.backbones.mixers.retention.Retention`.
        init_values: Initial value of the layer scales in blocks of retention.
        **kwargs: num_classes, global_pool, drop_rate, norm_outputs: see `Backbone`.
        """
        factory = dict(device=device, dtype=dtype)
        widths = [embed_dim * 2**i for i in range(4)]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        options = dict(
            init_values=init_values, retention=dict(dims=dims, directions=directions, form=form, chunk=chunk)
        )
        stages = []
        for i, dim in enumerate(widths):
            if i < 2:
                blocks = [ConvBlock(dim, rate, **factory) for rate in rates[i]]
            else:
                blocks = [MapBlock(dim, num_heads[i - 2], rate, **options, **factory) for rate in rates[i]]
            stages.append(Stage(blocks, _halving(dim // 2, dim, **factory) if i > 0 else None))
        stem = nn.Sequential(
            _halving(in_chans, 64, **factory),
            nn.BatchNorm2d(64, **factory),
            nn.ReLU(),
            _halving(64, embed_dim, **factory),
            nn.BatchNorm2d(embed_dim, **factory),
            nn.ReLU(),
        )
        super().__init__(stem, stages, widths, norm_layer=nn.BatchNorm2d, in_chans=in_chans, **factory, **kwargs)
        self.apply(init_linear)


# From the authors' names, and from timm's ViTs, to ours.
OFFICIAL_NAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^(cls_token|pos_embed)$", r"stem.\1"),
    (r"\.attn\.qkv\.", ".retention.qkv."),
    (r"\.attn\.proj\.", ".retention.proj_out."),
    LAST_PROJECTION,
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn a checkpoint of the authors' code, or one of timm's plain ViTs, into a state dict of `model`.

    A ViT's position of the class token is dropped. A ViT without layer scales gets scales of 1, which change nothing. A
    position embedding of another square grid is resized. The norm before the classifier becomes the norm of the last
    map if the model has `norm_outputs`.
    """
    from_vit = any(".attn.qkv." in name for name in state_dict)
    state_dict = rename(state_dict, OFFICIAL_NAMES)
    if not isinstance(model, ViR):
        return state_dict
    own = model.state_dict()
    if from_vit:
        scales = {name: torch.ones_like(value) for name, value in own.items() if name.endswith(".gamma")}
        state_dict = {**scales, **state_dict}
    if model.norm_outputs:
        state_dict = rename(state_dict, [(r"^norm\.", f"norm{len(model.blocks) - 1}.")])
    positions = state_dict["stem.pos_embed"]
    if positions.shape[1] != own["stem.pos_embed"].shape[1]:
        side = math.isqrt(positions.shape[1])  # positions in front of a square grid are of tokens, not of patches
        patches = positions[:, -(side**2) :]
        state_dict["stem.pos_embed"] = resample_abs_pos_embed(patches, list(model.stem.grid), [side, side], 0)
    return state_dict


def _cfg(description: str, top1: str, **about: Any) -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        origin_url="https://github.com/NVlabs/ViR",
        paper_name="ViR: Vision Retention Networks",
        paper_ids="arXiv:2310.19731",
        description=description,
        **about,
    )


_ISOTROPIC = dict(
    description="no weights are public: the authors released code for review only",
    top1="unknown",
    first_conv="stem.proj",
)
_HYBRID = dict(
    description="the paper's idea of a hybrid in sizes of our own; there are no weights",
    top1="none, because the sizes are ours",
    first_conv="stem.0",
)

default_cfgs = generate_default_cfgs(
    {
        "vir_small_patch16_224": _cfg(**_ISOTROPIC, pool_size=(14, 14)),
        "vir_base_patch16_224": _cfg(**_ISOTROPIC, pool_size=(14, 14)),
        "vir_large_patch16_224": _cfg(**_ISOTROPIC, pool_size=(14, 14)),
        "vir_large_patch14_224": _cfg(**_ISOTROPIC, pool_size=(16, 16)),
        "vir_hybrid_tiny": _cfg(**_HYBRID),
        "vir_hybrid_small": _cfg(**_HYBRID),
    }
)


def _quarters(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The last block of each quarter."""
    return tuple(arguments["depth"] * i // 4 - 1 for i in (1, 2, 3, 4))


_LARGE = dict(embed_dim=1024, depth=24, num_heads=16)

register_variants(
    __name__,
    ViR,
    {
        "vir_small_patch16_224": dict(embed_dim=384, depth=12, num_heads=6),
        "vir_base_patch16_224": dict(embed_dim=768, depth=12, num_heads=12),
        "vir_large_patch16_224": dict(**_LARGE),
        "vir_large_patch14_224": dict(patch_size=14, **_LARGE),
    },
    out_indices=_quarters,
)
register_variants(
    __name__,
    ViRHybrid,
    {
        "vir_hybrid_tiny": dict(embed_dim=64, depths=(2, 3, 6, 5), num_heads=(8, 16)),
        "vir_hybrid_small": dict(embed_dim=96, depths=(3, 3, 7, 5), num_heads=(12, 24)),
    },
)

"""InfViT: a plain ViT with infinite self-attention (InfSA), whose linear form gives every token the same context.

Paper: Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention, 2026, arXiv
2603.00175.
Official code: github.com/giorgioroffo/infinite-self-attention, MIT licence: the attention module and a small example
network. It has no InfViT, no training code and no weights.

The names of the attention's parameters are the official module's. The paper's models are not published, so two parts
were found by counting (model_cards/infvit.md): a layer with tanh before the classifier, and in the pure form one more
linear layer in each block. We put it after the heads, where it begins as the identity, so that the network begins as
the official module. Without both parts (`pre_logits=False, extra_proj=False`) this is the official example network.

Differences from the official code: rho is trained (the official forward pass converts it to a Python number). There is
no dropout. Images of any size are padded to whole patches, and positions are resized bicubically; as in the official
code, a grid with as many patches as the table takes the table as it is (not so in exports with open sizes).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models import generate_default_cfgs
from torch import nn

from terrazzo.backbones._checks import sides
from terrazzo.backbones._head import TokenHead
from terrazzo.backbones._layers import dimensioned, patch_conv
from terrazzo.backbones._plain import Plain, TokenStem
from terrazzo.backbones._registration import imagenet_cfg, register_variants
from terrazzo.backbones._states import Grid
from terrazzo.backbones._weights import LAST_PROJECTION, any_prefix, rename, take_old_names
from terrazzo.backbones.mixers._infsa import EPS, LearnedRho
from terrazzo.backbones.mixers.infsa import normalised
from terrazzo.backbones.mixers.linear_infsa import agreements, focus
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.dispatch.exporting import is_exporting

__all__ = ["InfViT"]

TOKENS = 2**14  # the most tokens of an image that a layer computes at once (2048 x 2048 pixels in patches of 16)

_norm_layer = partial(nn.LayerNorm, eps=1e-5)


def parts_of(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Tokens (B, N, C) in parts of at most `TOKENS` tokens; a graph takes all at once."""
    return [x] if torch.compiler.is_compiling() or is_exporting() else x.split(TOKENS, 1)


def in_parts(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of single tokens to (B, N, C), so that wide layers need memory for a part only."""
    parts = parts_of(x)
    return run(x) if len(parts) == 1 else torch.cat([run(part) for part in parts], 1)


class _Attention(nn.Module):
    """What all forms of attention share: projections, and an optional layer between the heads and the last projection.

    Attributes:
        mix_proj: The additional layer; None for none.
    """

    def __init__(self, dim: int, heads: int, extra_proj: bool, **factory):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj_out = (nn.Linear(dim, dim, **factory) for _ in range(4))
        self.mix_proj = nn.Linear(dim, dim, **factory) if extra_proj else None
        self.register_load_state_dict_pre_hook(take_old_names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official module's initialisation; the additional layer is the identity."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.proj_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.mix_proj is not None:
            nn.init.eye_(self.mix_proj.weight)
            nn.init.zeros_(self.mix_proj.bias)

    def by_head(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Channels (B, N, C) by head, (B, heads, N, D)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2).to(dtype)

    def merged(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rest after the mixing, (B, heads, N, D) to (B, N, C)."""
        x = x.transpose(1, 2).flatten(2).to(dtype)
        return self.proj_out(x if self.mix_proj is None else self.mix_proj(x))


class PureInfSA(_Attention, LearnedRho):
    """Pure InfSA on tokens (B, N, C): see `terrazzo.backbones.mixers.infsa`. No tensor has N x N numbers."""

    def __init__(self, dim: int, heads: int, extra_proj: bool, rho: float, rho_trainable: bool, **factory):
        super().__init__(dim, heads, extra_proj, **factory)
        self.add_rho(rho, rho_trainable, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        dtype = accumulator(query)
        with without_autocast(x):
            out = self.rho(dtype) * normalised(*(self.by_head(part, dtype) for part in (query, key, value)))
        return self.merged(out, value.dtype)


class LinearInfSA(_Attention, LearnedRho):
    """Linear InfSA on tokens (B, N, C): see `terrazzo.backbones.mixers.linear_infsa`.

    All tokens get the same result, so the last projection is computed once for an image. Queries, keys and values exist
    for a part of the tokens at a time.
    """

    def __init__(self, dim: int, heads: int, extra_proj: bool, rho: float, rho_trainable: bool, **factory):
        super().__init__(dim, heads, extra_proj, **factory)
        self.add_rho(rho, rho_trainable, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = parts_of(x)
        total, energy = _added(self._focus(part) for part in parts)
        context, weight = _added(self._context(part, total / (energy + EPS)) for part in parts)
        out = self.merged(self.rho(context.dtype) * context / (weight + EPS), x.dtype)
        return out.expand(-1, x.shape[1], -1)

    def _focus(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query = self.q_proj(x)
        with without_autocast(x):
            return focus(self.by_head(query, accumulator(query)))

    def _context(self, x: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of values by how much their keys agree with the mean query (B, heads, 1, D), and the weights' sum."""
        key, value = self.k_proj(x), self.v_proj(x)
        with without_autocast(x):
            found = agreements(self.by_head(key, mean.dtype), mean)
            return found.transpose(2, 3) @ self.by_head(value, mean.dtype), found.sum(2, keepdim=True)


def _added(parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = zip(*parts)
    return sum(first[1:], first[0]), sum(second[1:], second[0])


class Softmax(_Attention):
    """Softmax attention, the paper's baseline. It has no rho."""

    def __init__(self, dim: int, heads: int, extra_proj: bool, rho: float, rho_trainable: bool, **factory):
        super().__init__(dim, heads, extra_proj, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (self.by_head(layer(x), x.dtype) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.merged(F.scaled_dot_product_attention(query, key, value), value.dtype)


KINDS = {"linear": LinearInfSA, "pure": PureInfSA, "softmax": Softmax}


class Block(nn.Module):
    """Pre-norm attention and MLP on tokens (B, N, C)."""

    def __init__(self, attn: nn.Module, dim: int, drop_path: float, **factory):
        super().__init__()
        self.norm1 = _norm_layer(dim, **factory)
        self.attn = attn
        self.norm2 = _norm_layer(dim, **factory)
        self.mlp = Mlp(dim, 4 * dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(in_parts(lambda part: self.mlp(self.norm2(part)), x))


class Stem(TokenStem):
    """`TokenStem`, whose table fits every grid with as many patches, as in the official example network."""

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        if not is_exporting() and grid[0] * grid[1] == self.pos_embed.shape[1] - 1:
            return self.pos_embed
        return super().positions(grid)


class PreLogitsHead(TokenHead):
    """A token head with a linear layer and tanh after the pooling; it has neither without a classifier."""

    def _fit(self, num_classes: int, pool_type: str, **factory) -> None:
        super()._fit(num_classes, pool_type, **factory)
        if num_classes == 0 or self.global_pool.is_identity():
            self.pre_logits = None
        elif getattr(getattr(self, "pre_logits", None), "in_features", None) != self.num_features:
            self.pre_logits = nn.Linear(self.num_features, self.num_features, **factory)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = super().forward(x, pre_logits=True)
        if self.pre_logits is not None:
            x = self.pre_logits(x).tanh()
        return x if pre_logits else self.classify(x)


class InfViT(Plain):
    """InfViT: a plain ViT with InfSA.

    `forward_features` returns the head's input, the normalised tokens (B, 1 + N, C) with the class token in front.
    Features are maps, without the token.

    Source: arXiv 2603.00175.
    """

    no_decay = ("cls_token", "pos_embed", "rho_logit")
    gives_tokens = True

    def __init__(
        self,
        kind: str = "linear",
        depth: int = 4,
        embed_dim: int = 1024,
        num_heads: int = 16,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        pre_logits: bool = True,
        extra_proj: bool = False,
        rho: float = 0.95,
        rho_trainable: bool = True,
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
        kind: "linear" or "pure" for the forms of InfSA, or "softmax" for the paper's baseline.
        img_size: The side of the images (or height and width) that the position embedding is made for; for other images
            it is resized.
        pre_logits: Whether a linear layer and tanh precede the classifier.
        extra_proj: Whether attention has one more linear layer before its last projection.
        rho: The norm of the attention matrix (pure) or the sum of a token's weights (linear) at the start.
        rho_trainable: Whether training changes rho. The official code never does.
        **kwargs: norm_outputs: see `Backbone`.

        Raises:
            InputError: `kind` is unknown, the heads do not divide the channels, or rho is not between 0 and 1.
        """
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        factory = dict(device=device, dtype=dtype)
        size = sides("img_size", img_size)
        blocks = [
            Block(
                KINDS[kind](embed_dim, num_heads, extra_proj, rho, rho_trainable, **factory), embed_dim, rate, **factory
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        patches = patch_conv(in_chans, embed_dim, patch_size, **factory)
        super().__init__(
            Stem(patches, embed_dim, tuple(-(-side // patch_size) for side in size), **factory),
            blocks,
            embed_dim,
            patch_size,
            norm_layer=_norm_layer,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            **factory,
            **kwargs,
        )
        head = PreLogitsHead if pre_logits else TokenHead
        self.head = head(embed_dim, num_classes, global_pool, drop_rate, **factory)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        state = Grid()
        return self.stem(x, state), state

    def to_map(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return x[:, 1:].unflatten(1, state.grid)

    def to_features(self, x: torch.Tensor, state: Grid) -> torch.Tensor:
        return self.norm(x)


# From the names of the official example network, and of timm's plain ViT, to ours.
OFFICIAL_NAMES = [
    (r"^(?=(?:cls_token|pos_embed)$)", "stem."),
    (r"^patch_embed\.(?:proj\.)?", "stem.patches."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.ff\.0\.", ".mlp.fc1."),
    (r"\.ff\.3\.", ".mlp.fc2."),
    (r"^encoder\.norm\.", "norm."),
    (r"\.attn\.proj\.", ".attn.proj_out."),
    LAST_PROJECTION,
    (r"^head\.(?=weight|bias)", "head.fc."),
]


@any_prefix
def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn a checkpoint of the official example network, or of a plain ViT of timm, into a state dict of `model`.

    A ViT has no rho and no additional layer: these keep the model's values. A position embedding of another size is
    resized.
    """
    out, from_vit = {}, False
    for name, value in rename(state_dict, OFFICIAL_NAMES).items():
        if ".attn.qkv." in name:
            from_vit = True
            parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3))
            out |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
        else:
            out[name] = value
    if from_vit:
        kept = (name for name in model.state_dict() if name.rsplit(".attn.")[-1].startswith(("rho_logit", "mix_proj")))
        out |= {name: model.state_dict()[name] for name in kept if name not in out}
    positions, own = out.get("stem.pos_embed"), model.stem.pos_embed
    if positions is not None and positions.shape[1] != own.shape[1]:
        out["stem.pos_embed"] = resample_abs_pos_embed(positions, list(model.stem.grid))
    return dimensioned(out, model)


def _cfg(top1: float) -> dict[str, Any]:
    return imagenet_cfg(
        top1,
        pool_size=(14, 14),
        first_conv="stem.patches",
        origin_url="https://github.com/giorgioroffo/infinite-self-attention",
        paper_name="Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention",
        paper_ids="arXiv:2603.00175",
        description="the authors publish no weights and no InfViT; checkpoints of their example network load",
    )


default_cfgs = generate_default_cfgs(
    {
        "infvit_linear_4l_patch16_224": _cfg(84.7),
        "infvit_pure_4l_patch16_224": _cfg(85.1),
        "infvit_pure_24l_patch16_224": _cfg(85.4),
    }
)


def _quarters(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The last block of each quarter."""
    return tuple(arguments["depth"] * i // 4 - 1 for i in (1, 2, 3, 4))


register_variants(
    __name__,
    InfViT,
    {
        "infvit_linear_4l_patch16_224": dict(kind="linear", depth=4),
        "infvit_pure_4l_patch16_224": dict(kind="pure", depth=4, extra_proj=True),
        "infvit_pure_24l_patch16_224": dict(kind="pure", depth=24, extra_proj=True),
    },
    out_indices=_quarters,
)

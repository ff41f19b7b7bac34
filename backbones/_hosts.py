"""timm's plain ViTs as hosts: their loops over blocks pass on where the tokens stand, and a reducer runs the blocks.

`terrazzo.reduce` and `terrazzo.convert_attention` make a host of a model in place, by its class and the classes of its
blocks and their attention. Parameters, their names and all methods stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from terrazzo.backbones._checks import check_image
from terrazzo.backbones._hosted import hosted, is_plain, plain
from terrazzo.backbones._record import Record, defaults, grouped
from terrazzo.backbones._record import plain as plain_data
from terrazzo.backbones._states import run
from terrazzo.backbones._tokens import Reducer, State
from terrazzo.backbones.mixers import Host, Mixer, create_mixer
from terrazzo.errors import InputError

ADDED = r"\.attn\.mixer\.|^reducer\."
"""Parameters that `reduce` and `convert_attention` add, which a file of the model's own weights lacks."""


class _Host:
    """Replaces timm's loops over blocks; `reduce` sets these attributes, except `class_tokens` (`_tokens.State`)."""

    reducer: Reducer
    restore: str
    full_last: int
    reduction: Record | None = None
    class_tokens = 1

    @property
    def conversion(self) -> dict[int, dict[str, Any]]:
        """For each layer with another mechanism than softmax attention: the mechanism's name and its options."""
        mixers = {i: block.attn.mixer for i, block in enumerate(self.blocks)}
        return {i: dict(mixer=m.name, **m.options) for i, m in mixers.items() if m is not None}

    @property
    def changes(self) -> Record:
        """What `convert_attention` and `reduce` made of the model, as JSON data: see `terrazzo.backbones._record`."""
        mixers = {i: block.attn.mixer for i, block in enumerate(self.blocks)}
        made = {i: (m.name, defaults(type(m)) | plain_data(m.options)) for i, m in mixers.items() if m is not None}
        found = {"convert": grouped(made)} if made else {}
        return found | ({} if self.reduction is None else {"reduce": self.reduction})

    def _begin(self, x: torch.Tensor, maps: bool) -> tuple[torch.Tensor, State]:
        # The first weight with a kernel takes the image, in a hybrid stem, too.
        check_image(x, next(p.shape[1] for p in self.patch_embed.parameters() if p.dim() == 4))
        grid = tuple(self.patch_embed.dynamic_feat_size(x.shape[2:]))
        x, ropes = self._embedded(self.patch_embed(x))
        state = self.reducer.begin(grid, self.num_prefix_tokens, 0, maps)
        state.ropes, state.class_tokens = ropes, self.class_tokens
        return self.norm_pre(x), state

    def _embedded(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor] | None]:
        """Tokens with positions, and the rotary positions for each block."""
        return self._pos_embed(x), None

    def _features(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """The normalised remaining tokens; one for every position if the head pools positions."""
        if self.global_pool in ("token", ""):
            return self.norm(self.reducer.left(x, state))
        return self.norm(self.reducer.restored(x, state, "copy"))

    def forward_features(self, x: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        """(B, in_chans, H, W) to normalised tokens (B, T, C); the reducer decides T."""
        _refuse_masks(attn_mask, is_causal)
        x, state = self._begin(x, maps=self.global_pool not in ("token", ""))
        for block in self.blocks:
            x = run(block, x, state, self.grad_checkpointing)
        return self._features(x, state)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Any:
        """Like timm's method, with all maps restored."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, state = self._begin(x, maps=True)
        maps, prefixes = [], []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            if i == self.depth - self.full_last:
                x = self.reducer.finished(x, state, self.restore)
            x = run(block, x, state, self.grad_checkpointing)
            if i in taken:
                y = self.reducer.restored(x, state, self.restore)
                prefix, y = (self.norm(y) if norm else y).tensor_split([state.prefix], 1)
                prefixes.append(prefix)
                maps.append(y.transpose(1, 2).unflatten(2, state.grid).contiguous() if output_fmt == "NCHW" else y)
        with_prefix = return_prefix_tokens and state.prefix > 0
        if output_dict:
            out = {"image_intermediates": maps}
            if with_prefix:
                out["image_intermediates_prefix"] = prefixes
            return out if intermediates_only else {**out, "image_features": self._features(x, state)}
        if with_prefix:
            maps = list(zip(maps, prefixes))
        return maps if intermediates_only else (self._features(x, state), maps)


class HostViT(_Host, VisionTransformer):
    """timm's VisionTransformer as a host."""


class HostViTDistilled(_Host, VisionTransformerDistilled):
    """timm's VisionTransformer with a distillation token as a host."""

    class_tokens = 2


class HostEva(_Host, Eva):
    """timm's Eva (EVA-02, DINOv3, PE) as a host."""

    def _embedded(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor] | None]:
        x, rope = self._pos_embed(x)
        if rope is None:
            return x, None
        ropes = rope if getattr(self, "rope_mixed", False) else [rope] * len(self.blocks)
        return x, dict(enumerate(ropes))


REBUILT = "terrazzo_changed_vit"
"""The name of the model that files of timm's `save_for_hf` name for a host: see `terrazzo.backbones._rebuilt`."""

KEPT = "terrazzo"
"""Where a host's configuration has the name of timm's model, "base", and the record of its changes, "changes"."""

_HOSTS = {VisionTransformer: HostViT, VisionTransformerDistilled: HostViTDistilled, Eva: HostEva}


def _refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputError(
            "a ViT that reduces tokens or has other attention takes no mask: a mask would not fit the tokens"
        )


def unwrapped(model: nn.Module) -> Any:
    """The model itself, a ViT of timm if it is a host: timm wraps it for `features_only=True`."""
    return model.model if isinstance(model, FeatureGetterNet) else model


def kind_of(model: nn.Module) -> type[nn.Module] | None:
    """timm's class of a model that is a host or can become a host; None for any other model."""
    return next((kind for kind, made in _HOSTS.items() if type(model) in (kind, made)), None)


def host_in(model: nn.Module) -> nn.Module | None:
    """The model that is a host or can become a host: the model itself, or a part of a wrapper or a detector."""
    backbone = getattr(model, "backbone", None)  # beside it, a model may have a teacher
    parts = (backbone if isinstance(backbone, nn.Module) else model).modules()
    return next((part for part in parts if isinstance(part, _Host) or type(part) in _HOSTS), None)


def record_of(model: nn.Module) -> Record:
    """How `convert_attention` and `reduce` changed a model, or the model inside it; empty if they did not."""
    host = host_in(model)
    return host.changes if isinstance(host, _Host) else {}


def check_host(model: nn.Module, verb: str) -> None:
    """Check that a model is a host or can become a host.

    Args:
        verb: what cannot happen to any other model, for errors: "reduced".

    Raises:
        InputError: The model is of another kind, or a block is not plain, or drops tokens or attention weights.
    """
    if kind_of(model) is None:
        raise InputError(f"only timm's plain VisionTransformer and Eva can be {verb}, got {type(model).__name__}")
    for i, block in enumerate(model.blocks):
        if not is_plain(block):
            raise InputError(f"block {i} is not a plain block of timm with plain attention: {type(block).__name__}")
        if block.attn.attn_drop.p > 0:
            raise InputError(f"block {i} drops attention weights at {block.attn.attn_drop.p}: set attn_drop_rate=0")
    if not isinstance(model.patch_drop, nn.Identity | None):
        raise InputError("the model drops patches in training (patch_drop_rate): set it to 0")


def make_host(model: nn.Module) -> None:
    """Make a host of a model that `check_host` accepts, in place. A new host's reducer reduces nothing."""
    for block in model.blocks:
        hosted(block)
    if type(model) in _HOSTS:
        model.reducer = Reducer().train(model.training)
        model.restore, model.full_last, model.depth = "delta", 0, len(model.blocks)
        model.__class__ = _HOSTS[type(model)]


def new_mixers(model: Any, mixer: str, layers: Iterable[int], options: Mapping[str, Any]) -> dict[int, Mixer]:
    """A new mixer for each of some layers of a model that `check_host` accepts, which does not change.

    Raises:
        InputError: see `create_mixer`.
    """
    like = next(model.parameters())

    def made(layer: int) -> Mixer:
        attn = model.blocks[layer].attn
        host = Host(model.embed_dim, attn.num_heads, attn.head_dim, layer, len(model.blocks))
        return create_mixer(mixer, host, device=like.device, dtype=like.dtype, **options).train(model.training)

    return {layer: made(layer) for layer in layers}


def remember(model: nn.Module) -> None:
    """Write what changed a host into the configuration that timm's `save_for_hf` stores: the model's name, and KEPT."""
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        base = cfg[KEPT]["base"] if KEPT in cfg else cfg.get("architecture")
        kept = {"base": base, "changes": model.changes}
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": REBUILT, KEPT: kept}


def _forget(model: nn.Module) -> None:
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    if KEPT in cfg:
        model.pretrained_cfg = model.default_cfg = cfg | {"architecture": cfg.pop(KEPT)["base"]}


def unmake_host(model: nn.Module) -> None:
    """Give a host timm's classes again, without reducer and mixers."""
    for block in model.blocks:
        plain(block)
    _forget(model)
    model.__class__ = kind_of(model)
    del model.reducer, model.restore, model.full_last, model.depth
    model.__dict__.pop("reduction", None)

"""`terrazzo.reduce`: make an existing plain ViT of timm reduce its tokens, and still return full maps."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from terrazzo.backbones._checks import check_image
from terrazzo.backbones._reducible import is_plain, reducible
from terrazzo.backbones._states import run
from terrazzo.backbones._tokens import RESTORE, Reducer, State
from terrazzo.backbones._windows import within
from terrazzo.backbones.asvit import Pruning
from terrazzo.backbones.mctf import Fusion
from terrazzo.errors import InputError

METHODS: dict[str, type[Reducer]] = {"asvit": Pruning, "mctf": Fusion}
"""The methods of `reduce`: reducers, which take `blocks` and further options."""


class _Reducing:
    """Replaces timm's loops over blocks; `reduce` sets `reducer` and `restore`."""

    reducer: Reducer
    restore: str

    def _begin(self, x: torch.Tensor, maps: bool) -> tuple[torch.Tensor, State]:
        # The first weight with a kernel takes the image, in a hybrid stem, too.
        check_image(x, next(p.shape[1] for p in self.patch_embed.parameters() if p.dim() == 4))
        grid = tuple(self.patch_embed.dynamic_feat_size(x.shape[2:]))
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        return x, self.reducer.begin(grid, self.num_prefix_tokens, 0, maps)

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


class ReducedVisionTransformer(_Reducing, VisionTransformer):
    """timm's VisionTransformer with a reducer that runs its blocks; made by `reduce`."""


class ReducedVisionTransformerDistilled(_Reducing, VisionTransformerDistilled):
    """timm's ViT with a distillation token and a reducer that runs its blocks; made by `reduce`."""


_REDUCED = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


def _refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputError("a ViT that reduces tokens takes no mask: a mask would no longer fit the reduced tokens")


def _reducer(model: VisionTransformer, method: str, blocks: Sequence[int] | None, options: dict[str, Any]) -> Reducer:
    """The reducer of a method for a model, on the model's device and in its dtype."""
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kind, depth = METHODS[method], len(model.blocks)
    known = [name for name in inspect.signature(kind).parameters if name not in ("blocks", "device", "dtype")]
    if not options.keys() <= set(known):
        raise InputError(f"options of {method!r} are {', '.join(known)}, got {', '.join(options)}")
    if kind.by_class_token and model.cls_token is None:
        raise InputError(f"{method!r} needs a class token's attention, and this model has no class token")
    reducer = kind(blocks=kind.default_blocks(depth) if blocks is None else blocks, **options)
    if not all(0 <= block < depth for block in reducer.blocks):
        raise InputError(f"blocks must be some of 0 to {depth - 1}, got {reducer.blocks}")
    like = next(model.parameters())
    return reducer.to(like.device, like.dtype).train(model.training)


def reduce(
    model: VisionTransformer,
    method: str = "mctf",
    blocks: Sequence[int] | None = None,
    restore: str = "delta",
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    **options: Any,
) -> VisionTransformer:
    """Make a plain ViT of timm, pretrained or not, reduce its tokens, and return it.

    The model is changed in place: its class, the classes of its blocks and of their attention, and its attribute
    `reducer`. Its parameters, their names and all of timm's methods stay; maps (`forward_intermediates`,
    `features_only`) have every position. "mctf" with r = 0 computes the same as the model before, to the bit. "asvit"
    adds thresholds, `reducer.thresholds.0` and so on, which train with the model: load timm's weights before, or with
    `strict=False`. A second call replaces the reducer of the first call.

        model = terrazzo.reduce(timm.create_model("vit_small_patch16_224", pretrained=True), r=16)
        model = terrazzo.reduce(model, method="asvit", thresholds=(0.002, 0.004, 0.006))
        model = terrazzo.reduce(model, method="asvit", form="fixed", keep=(0.7, 0.5, 0.35))

    If the head pools all positions ("avg", "map", ...), a merged token counts for each position that it stands for, and
    a dropped token counts with the features that it had when it was dropped.

    Args:
        model: timm's VisionTransformer or VisionTransformerDistilled with timm's plain blocks.
        method: "mctf" merges similar tokens, "asvit" drops tokens of low class attention.
        blocks: The blocks that merge tokens, or in front of which tokens are dropped, counted from 0. None for the
            method's default: all but the first ("mctf"), or three, evenly spread ("asvit": 4, 7 and 10 of 12).
        restore: "copy", "delta" or "soft": how merged positions are restored in maps.
        window: Blocks attend within square windows with a side of at most this many patches; see `_plain.PlainViT`.
        global_blocks: With `window`: blocks that attend to the whole image; None for the last block of each quarter.
        **options: For "mctf": r, criteria, bidirectional, cells_first, multiple: see `terrazzo.backbones.mctf.Fusion`.
            For "asvit": form, keep, thresholds: see `terrazzo.backbones.asvit.Pruning`.

    Raises:
        InputError: The model is of another kind, or a method, an option or a number is not valid.
    """
    kind = next((kind for kind, made in _REDUCED.items() if type(model) in (kind, made)), None)
    if kind is None:
        raise InputError(f"only timm's plain VisionTransformer can be reduced, got {type(model).__name__}")
    for i, block in enumerate(model.blocks):
        if not is_plain(block):
            raise InputError(f"block {i} is not a plain block of timm with plain attention: {type(block).__name__}")
        if block.attn.attn_drop.p > 0:
            raise InputError(f"block {i} drops attention weights at {block.attn.attn_drop.p}: set attn_drop_rate=0")
    if not isinstance(model.patch_drop, nn.Identity):
        raise InputError("the model drops patches in training (patch_drop_rate): set it to 0")
    if not isinstance(restore, str) or restore not in RESTORE:
        raise InputError(f"restore must be one of {', '.join(RESTORE)}, got {restore!r}")
    reducer = _reducer(model, method, blocks, options)
    model.reducer = within(reducer, window, len(model.blocks), global_blocks)
    model.restore = restore
    for block in model.blocks:
        reducible(block)
    model.__class__ = _REDUCED[kind]
    return model

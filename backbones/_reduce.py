"""`terrazzo.reduce`: make an existing plain ViT of timm reduce its tokens, and still return full maps."""

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from terrazzo.backbones._checks import whole
from terrazzo.backbones._convert import check_together
from terrazzo.backbones._hosts import check_host, kind_of, make_host, remember, unwrapped
from terrazzo.backbones._record import defaults, plain
from terrazzo.backbones._tokens import RESTORE, Reducer
from terrazzo.backbones._windows import within
from terrazzo.backbones.reducers import create_reducer, reducer_class
from terrazzo.errors import InputError


def _reducer(model: VisionTransformer, method: str, blocks: Sequence[int] | None, options: dict[str, Any]) -> Reducer:
    """The reducer of a method for a model, on the model's device and in its dtype."""
    reducer = create_reducer(method, len(model.blocks), blocks, options)
    if reducer.by_class_token and model.cls_token is None:
        raise InputError(f"{method!r} needs a class token's attention, and this model has no class token")
    like = next(model.parameters())
    return reducer.to(like.device, like.dtype).train(model.training)


def reduce(
    model: nn.Module,
    method: str = "mctf",
    blocks: Sequence[int] | None = None,
    restore: str = "delta",
    window: int | None = None,
    global_blocks: Sequence[int] | None = None,
    full_last: int | None = None,
    **options: Any,
) -> nn.Module:
    """Make a plain ViT of timm, pretrained or not, reduce its tokens, and return it.

    The model is changed in place: its class, the classes of its blocks and of their attention, and its attribute
    `reducer`. Its parameters, their names and all of timm's methods stay; maps (`forward_intermediates`,
    `features_only`) have every position. "mctf" with r = 0 computes the same as the model before, to the bit. "asvit"
    adds thresholds, `reducer.thresholds.0` and so on, which train with the model: load timm's weights before, or with
    `strict=False`. A second call replaces the reducer of the first call.

        model = terrazzo.reduce(timm.create_model("vit_small_patch16_224", pretrained=True), r=16)
        model = terrazzo.reduce(model, method="asvit", thresholds=(0.002, 0.004, 0.006))
        model = terrazzo.reduce(model, method="asvit", form="fixed", keep=(0.7, 0.5, 0.35))
        model = terrazzo.reduce(model, method="tome", r=13)

    If the head pools all positions ("avg", "map", ...), a merged token counts for each position that it stands for, and
    a dropped token counts with the features that it had when it was dropped. In maps, a dropped token gets the update
    of the kept token that was most similar to it ("asvit": the mean of five); with `restore="copy"` it keeps its
    features.

    A kept token keeps its rotary position. A merged token has, for each frequency, the circular mean of its patches'
    angles; the angle at their mean coordinates would be the alternative (`terrazzo.backbones._rotary`).

    Args:
        model: timm's VisionTransformer, VisionTransformerDistilled or Eva (DINOv3, EVA-02, PE: with rotary positions)
            with timm's plain blocks, or its wrapper for `features_only=True`.
        method: "mctf", "tome" and "pitome" merge similar tokens, "dpcknn" clusters them, "asvit" drops tokens of low
            class attention, "evit" fuses them into one token (or drops them: Top-K), "diffrate" drops some and merges
            others, "pool" averages 2x2 cells.
        blocks: The blocks in which, or in front of which, tokens are merged or dropped, counted from 0. None for the
            method's default: all ("tome", "pitome", "diffrate"), all but the first ("mctf"), the middle one ("pool"),
            or three, evenly spread ("evit", "dpcknn": 3, 6 and 9 of 12; "asvit": 4, 7 and 10).
        restore: "copy", "delta" or "soft": how merged positions are restored in maps.
        window: Blocks attend within square windows with a side of at most this many patches; see `_plain.PlainViT`.
        global_blocks: With `window`: blocks that attend to the whole image; None for the last block of each quarter.
        full_last: The number of last blocks that run on restored tokens whenever maps are requested (last-layer fusion,
            arXiv 2412.00965). None for 1 where tokens are dropped ("asvit", "diffrate", "evit" with fuse=False), since
            a map needs it there, and 0 otherwise.
        **options: For "mctf": r, criteria, bidirectional, cells_first, multiple: see `terrazzo.backbones.mctf.Fusion`.
            For "asvit": form, keep, thresholds: see `terrazzo.backbones.asvit.Pruning`.
            For "tome": r. For "pitome": ratio, margin, bipartite. For "evit": keep, fuse. For "dpcknn": keep,
            neighbours. For "diffrate": keep. For "pool": part. See the classes in `terrazzo.backbones.reducers`.

    Raises:
        InputError: The model is of another kind, or a method, an option or a number is not valid.
    """
    given, model = model, unwrapped(model)
    check_host(model, "reduced")
    if not isinstance(restore, str) or restore not in RESTORE:
        raise InputError(f"restore must be one of {', '.join(RESTORE)}, got {restore!r}")
    reducer = _reducer(model, method, blocks, options)
    given_options = dict(restore=restore, window=window, global_blocks=global_blocks, full_last=full_last, **options)
    record = {
        "method": method,
        "options": defaults(reducer_class(method)) | plain(given_options),
        "blocks": plain(reducer.blocks),
    }
    reducer = within(reducer, window, len(model.blocks), global_blocks)
    if kind_of(model) is not type(model):
        check_together(model, reducer)
    full_last = reducer.full_last if full_last is None else whole("full_last", full_last)
    if not 0 <= full_last <= len(model.blocks):
        raise InputError(f"full_last must be 0 to the {len(model.blocks)} blocks, got {full_last}")
    make_host(model)
    model.reducer, model.restore, model.full_last, model.reduction = reducer, restore, full_last, record
    remember(model)
    return given

"""The model that files of timm's `save_for_hf` name for a ViT that `convert_attention` and `reduce` changed.

Its arguments are the name of timm's model and the record of its changes (`terrazzo.backbones._record`). So
`timm.create_model` of `hf-hub:...` and `local-dir:...` builds the model, changes it in the same way, and loads its
weights.
"""

from functools import partial
from typing import Any

import timm
import torch
from timm.models import load_pretrained, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.backbones._hosts import check_host
from terrazzo.backbones._names import check_name, family_of
from terrazzo.backbones._record import Record, checked
from terrazzo.backbones._reduce import reduce
from terrazzo.backbones._weights import filter_of
from terrazzo.errors import InputError, first_line


def _changed(model: nn.Module, record: Record) -> None:
    for entry in record.get("convert", ()):
        convert_attention(model, entry["mixer"], entry["layers"], **entry["options"])
    if entry := record.get("reduce"):
        reduce(model, entry["method"], entry["blocks"], **entry["options"])


def _fitting(weights: dict[str, torch.Tensor], model: nn.Module, base: str) -> dict[str, torch.Tensor]:
    """Resize the position embedding and patches of a model of other sizes, as timm does; leave all else as it is."""
    own = model.state_dict()
    resized = [name for name, value in weights.items() if name.startswith(("pos_embed", "patch_embed"))]
    if all(weights[name].shape == own[name].shape for name in resized if name in own):
        return weights
    found = filter_of(base)(dict(weights), model)
    return weights | {name: found[name] for name in resized}


@register_model
def terrazzo_changed_vit(
    pretrained: bool = False,
    base: str = "",
    changes: Record | None = None,
    pretrained_cfg: Any = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    out_indices: Any = 3,
    **kwargs: Any,
) -> nn.Module:
    """A plain ViT of timm with other mechanisms or fewer tokens, as `save_for_hf` has stored it.

    Args:
        pretrained: Load the weights that `pretrained_cfg` names: a folder or a repository of the Hugging Face hub.
        base: The name of timm's model.
        changes: The record of its changes, `model.changes`.
        **kwargs: Arguments of timm's model.

    Raises:
        InputError: The record is malformed, or it does not fit the model.
    """
    where = "config.json names a ViT that terrazzo changed, and"
    if not isinstance(base, str) or not base:
        raise InputError(f"{where} its model_args lack the name of timm's model, base; save the model again")
    try:
        record = checked(changes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} its model_args have a malformed record, changes; save the model again") from error
    check_name(base)
    if family_of(base) is not None:
        raise InputError(f"{where} base is {base!r}, which is no model of timm's own")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    stored = isinstance(pretrained_cfg, dict)
    options = dict(pretrained_cfg=pretrained_cfg, cache_dir=cache_dir, **kwargs)
    try:
        model = timm.create_model(base, pretrained=pretrained and not stored, **options)
    except TypeError as error:
        raise InputError(f"{where} its model_args do not fit {base}: {first_line(error)}") from error
    check_host(model, "rebuilt")
    try:
        _changed(model, record)
    except TypeError as error:
        raise InputError(f"{where} its changes do not fit this version: {first_line(error)}") from error
    if pretrained and stored:
        cfg = {**model.pretrained_cfg, "custom_load": False}
        fitting = partial(_fitting, base=base)
        load_pretrained(model, cfg, model.num_classes, model.in_chans, fitting, strict=True, cache_dir=cache_dir)
    if features_only:
        return FeatureGetterNet(model, out_indices, prune=False)
    return model

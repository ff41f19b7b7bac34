"""The model that files of timm's `save_for_hf` name for a ViT that `convert_attention` and `reduce` changed.

Their configuration has the name of timm's model and the record of its changes (`terrazzo.backbones._record`). So
`timm.create_model` of `hf-hub:...` and `local-dir:...` builds the model, changes it in the same way, and loads its
weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models import load_pretrained, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.backbones._hosts import KEPT, REBUILT, check_host
from terrazzo.backbones._names import EVERY_MODEL, check_name, family_of
from terrazzo.backbones._record import Record, checked
from terrazzo.backbones._reduce import reduce
from terrazzo.backbones._weights import filter_of
from terrazzo.errors import InputError, first_line


def change(model: nn.Module, record: Record) -> None:
    """Change a plain ViT of timm in place, as a record says.

    Raises:
        InputError: the record does not fit the model.
    """
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
    pretrained_cfg: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    **kwargs: Any,
) -> nn.Module:
    """A plain ViT of timm with other mechanisms or fewer tokens, as `save_for_hf` has stored it.

    Args:
        pretrained: Load the weights beside the configuration.
        pretrained_cfg: The configuration of a folder or of a repository of the Hugging Face hub.
        **kwargs: Arguments of timm's model.

    Raises:
        InputError: The configuration is of something else, or is malformed, or it does not fit the model.
    """
    stored = dict(pretrained_cfg) if isinstance(pretrained_cfg, dict) else {}
    kept = stored.pop(KEPT, None)
    if kept is None:
        raise InputError(
            "terrazzo_changed_vit is built from files of save_for_hf: name them, 'local-dir:FOLDER' or "
            "'hf-hub:REPOSITORY'"
        )
    where = "config.json names a ViT that terrazzo changed, and"
    try:
        base, record = kept["base"], checked(kept["changes"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} its record of the changes is malformed; save the model again") from error
    if not isinstance(base, str) or base == REBUILT:
        raise InputError(f"{where} base is {base!r}, and must be the name of a model of timm")
    check_name(base)
    if family_of(base, EVERY_MODEL) is not None:
        raise InputError(f"{where} base is {base!r}, which is no model of timm's own")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        model = timm.create_model(base, pretrained_cfg=stored, **kwargs)
    except TypeError as error:
        raise InputError(f"{where} its model_args do not fit {base}: {first_line(error)}") from error
    check_host(model, "rebuilt")
    try:
        change(model, record)
    except TypeError as error:
        raise InputError(f"{where} its changes do not fit this version: {first_line(error)}") from error
    if pretrained:
        cfg = {**model.pretrained_cfg, "custom_load": False}
        fitting = partial(_fitting, base=base)
        load_pretrained(model, cfg, model.num_classes, kwargs.get("in_chans", 3), fitting, cache_dir=cache_dir)
    return FeatureGetterNet(model, out_indices, prune=False) if features_only else model

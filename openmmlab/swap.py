"""Puts another backbone into a config, so that all compared models have the same heads, data and recipe."""

from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from timm.models import FeatureInfo
from torch import nn

from terrazzo.backbones._names import family_of
from terrazzo.errors import InputError
from terrazzo.openmmlab._timm import create_model


def swap_backbone(cfg: Config, name: str, **arguments: Any) -> None:
    """Replaces the `TerrazzoBackbone` (or the backbone of a `Classifier`) of a config by another timm model, in place.

    A dense model gives maps of the same strides, and neck and heads get their channels. A model without stochastic
    depth trains without it. Models with LayerNorm get a LayerNorm on each map, like the detectors of their papers.
    Models with BatchNorm have normalised maps already, except terrazzo's models: their maps are sums of branches.

    Args:
        cfg: a config from `load_config`.
        name: the name of a model, as in `timm.list_models()`.
        **arguments: arguments of the new backbone; they override the default choices.

    Raises:
        InputError: if the config has no such backbone, the model is unknown, or it lacks a map of a needed stride.
    """
    settings = (cfg.get("model") or {}).get("backbone") or {}
    if "name" not in settings:
        raise InputError("the config's model has no TerrazzoBackbone or Classifier, so its backbone cannot be replaced")
    kept = {key: settings[key] for key in ("type", "num_classes", "frozen_stages") if key in settings}
    if "drop_path_rate" in settings and _drops_paths(name):
        kept["drop_path_rate"] = settings["drop_path_rate"]
    if cfg.model.type == "Classifier":
        cfg.model.backbone = ConfigDict({**kept, "name": name, **arguments})
        cfg.model.pop("recipe", None)  # a recipe is for one family
        return
    model, info = _described(name)
    # If several maps share a stride, the last has passed through most layers.
    at = {entry["reduction"]: index for index, entry in enumerate(info)}
    _, old = _described(settings["name"])
    strides = [old[index]["reduction"] for index in settings.get("out_indices", range(len(old)))]
    lacking = [stride for stride in strides if stride not in at]
    if lacking:
        raise InputError(
            f"model '{name}' has maps of stride {sorted(at)} and none of stride {lacking}; choose a pyramid"
        )
    indices = tuple(at[stride] for stride in strides)
    channels = [info[index]["num_chs"] for index in indices]
    ours = family_of(name) is not None
    norm = ours or not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    cfg.model.backbone = ConfigDict({**kept, "name": name, "out_indices": indices, "norm_outputs": norm, **arguments})
    # If there is a neck, the heads take its maps.
    for part in ("neck",) if cfg.model.get("neck") else ("decode_head", "auxiliary_head"):
        if isinstance(cfg.model.get(part), dict) and "in_channels" in cfg.model[part]:
            _set_channels(cfg.model[part], channels)


def _described(name: str) -> tuple[nn.Module, list[dict]]:
    """A model without weights, and its description of its maps."""
    with torch.device("meta"):
        model = create_model(name, num_classes=0)
    info = getattr(model, "feature_info", None) or []
    return model, info.info if isinstance(info, FeatureInfo) else info


def _drops_paths(name: str) -> bool:
    """Whether a model has stochastic depth."""
    try:
        with torch.device("meta"):
            create_model(name, drop_path_rate=0.1)
    except InputError:
        return False
    return True


def _set_channels(part: ConfigDict, channels: list[int]) -> None:
    """Gives a neck or head the channels of the maps that it takes."""
    index = part.get("in_index")
    if isinstance(part.in_channels, (list, tuple)):
        part.in_channels = channels if index is None else [channels[position] for position in index]
    else:
        part.in_channels = channels[-1 if index is None else index]

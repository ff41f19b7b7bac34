"""What families say of their weights, and what their `checkpoint_filter_fn` needs: unwrapping, renaming, resizing."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

RECONSTRUCTED = "reconstructed from the paper; no public weights of the authors load"
"""What a family whose authors published neither code nor weights says of itself: docstring, configuration and card."""

_LICENCES = {
    r"levels\.\d+\.blocks\.\d+\.mixer\.A_log": (
        "MambaVision's weights, by NVIDIA, are licensed CC-BY-NC-SA-4.0: no commercial use, and what is made from them "
        "is shared alike"
    ),
}
"""By a name that only the authors' checkpoints have: what whoever takes their weights must know."""

_logger = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model", "module")


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a backbone: out of a training checkpoint's wrapper keys, and of a detector's `backbone.`."""
    for name in _WRAPPERS:
        if isinstance(checkpoint.get(name), Mapping):
            return unwrap(checkpoint[name])
    prefix = "backbone."
    if any(name.startswith(prefix) for name in checkpoint):
        return {name[len(prefix) :]: value for name, value in checkpoint.items() if name.startswith(prefix)}
    return dict(checkpoint)


def rename(state_dict: Mapping[str, torch.Tensor], pairs: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Apply every (regular expression, replacement) to every name, in order."""
    pairs = list(pairs)
    out = {}
    for name, value in state_dict.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def flatten_pointwise(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of 1x1 convolutions as the matrices that the model's linear layers have."""
    own = model.state_dict()
    for name, value in state_dict.items():
        if name in own and own[name].dim() == 2 and tuple(value.shape[2:]) == (1, 1):
            state_dict[name] = value.flatten(1)
    return state_dict


def resize_bias_tables(state_dict: dict[str, torch.Tensor], model: nn.Module, suffix: str) -> dict[str, torch.Tensor]:
    """Resize (heads, 2K - 1, 2K - 1) relative position tables to the model's kernel size, bicubically."""
    own = model.state_dict()
    for name, value in state_dict.items():
        if name.endswith(suffix) and name in own and own[name].shape[1:] != value.shape[1:]:
            size = tuple(own[name].shape[1:])
            table = F.interpolate(value[None].float(), size=size, mode="bicubic", align_corners=False)[0]
            state_dict[name] = table.to(value.dtype)
    return state_dict


def licence_notices(names: Iterable[str]) -> list[str]:
    """What is to be said of the weights of a checkpoint whose tensors are so named; nothing of most."""
    names = list(names)
    return [text for pattern, text in _LICENCES.items() if any(re.search(pattern, name) for name in names)]


def say_licence(names: Iterable[str]) -> None:
    """Put such notices where Python's warnings go, on the standard error unless logging is set up otherwise."""
    for notice in licence_notices(names):
        _logger.warning(notice)

"""Which timm models are terrazzo's, and building one by name."""

import contextlib
import re

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from terrazzo.backbones._names import EVERY_MODEL as EVERY_MODEL
from terrazzo.backbones._names import check_name
from terrazzo.backbones._names import family_of as family_of
from terrazzo.backbones._names import registered_models as registered_models
from terrazzo.errors import InputError
from terrazzo.tools.catalogue import NO_WEIGHTS as NO_WEIGHTS

_TOP1 = re.compile(r"top-?1\D{0,20}?(\d+(?:\.\d+)?)", re.IGNORECASE)


def require_model(name: str) -> str:
    """Return `name` if timm can build it, weights included; InputError with the closest names if not."""
    check_name(name)
    bare = name.split(".", 1)[0]
    tags = timm.list_pretrained(f"{bare}.*")
    if "." in name and name not in tags:
        raise InputError(f"no weights are called {name!r}; the weights of {bare} are: {', '.join(tags) or 'none'}")
    return name


def build_on_meta(name: str, **options) -> nn.Module:
    """Build model `name` without allocating its weights; for real if it computes with them while it is built."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options).eval()
    except (NotImplementedError, RuntimeError):
        return timm.create_model(name, **options).eval()


def options_for(name: str, size: tuple[int, int] | str) -> dict[str, object]:
    """What makes timm build a model for images of a size: most need nothing, ViTs have options for it.

    Args:
        size: (H, W), or "any": images of every size are taken, and padded to whole patches.
    """
    fixed = ({"dynamic_img_size": True}, {"img_size": size})
    for options in ({"dynamic_img_size": True, "dynamic_img_pad": True},) if size == "any" else fixed:
        with contextlib.suppress(TypeError):  # the model does not have this option
            build_on_meta(name, **options)
            return options
    return {}


def build_for(name: str, size: tuple[int, int], **options) -> nn.Module:
    """Build model `name` for images of a size (H, W), like `build_on_meta`."""
    if size != tuple(pretrained_cfg(name).input_size[1:]):
        options |= options_for(name, size)
    return build_on_meta(name, **options)


def pretrained_cfg(name: str) -> PretrainedCfg:
    """What timm knows about the default weights of `name`; an empty record if it knows nothing."""
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def published_top1(cfg: PretrainedCfg) -> float | None:
    """The ImageNet-1K top-1 accuracy in percent that the description or notes of `cfg` state, as `top-1 81.8`."""
    notes = (cfg.notes,) if isinstance(cfg.notes, str) else cfg.notes or ()
    for text in (cfg.description or "", *notes):
        if found := _TOP1.search(text):
            return float(found.group(1))
    return None

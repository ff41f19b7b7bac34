"""Which timm models are terrazzo's, and building one by name."""

import difflib
import re

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from terrazzo.errors import InputError

NO_WEIGHTS = "no weights"
"""Takes the place of a licence if the authors published no weights: the model is a reconstruction."""

_TOP1 = re.compile(r"top-?1\D{0,20}?(\d+(?:\.\d+)?)", re.IGNORECASE)


def family_of(name: str) -> str | None:
    """The terrazzo family (the stem of its file) that registers model `name`; None for timm's own models."""
    module = timm.models.model_entrypoint(name).__module__
    return module.rsplit(".", 1)[-1] if module.startswith("terrazzo.backbones.") else None


def registered_models() -> dict[str, str]:
    """Name of every model that terrazzo registers with timm, to its family; in natural order."""
    families = {name: family_of(name) for name in timm.list_models()}
    return {name: family for name, family in families.items() if family is not None}


def require_model(name: str) -> str:
    """Return `name` if timm can build it; InputError with the closest names if not."""
    bare = name.split(".", 1)[0]
    if not timm.models.is_model(bare):
        known = list(registered_models()) + timm.list_models()
        close = list(dict.fromkeys(difflib.get_close_matches(bare, known, n=3)))
        hint = f"did you mean {', '.join(close)}?" if close else "`terrazzo list` names the models"
        raise InputError(f"no model is called {name!r}; {hint}")
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

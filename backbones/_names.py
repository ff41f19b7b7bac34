"""Names of models: whether timm knows one, and of which family of terrazzo it is."""

import difflib
from collections.abc import Sequence

import timm

from terrazzo.errors import InputError

BACKBONES = ("backbones",)
EVERY_MODEL = ("backbones", "restoration")
"""Packages of terrazzo that register models with timm: backbones only, and all of them."""


def family_of(name: str, packages: Sequence[str] = BACKBONES) -> str | None:
    """The family (the stem of its file) in a package of terrazzo that registers model `name`; None for other models."""
    module = timm.models.model_entrypoint(name.split(".", 1)[0]).__module__
    package, _, family = module.removeprefix("terrazzo.").partition(".")
    ours = module.startswith("terrazzo.") and package in packages
    return family if ours and not family.startswith("_") else None


def registered_models(packages: Sequence[str] = BACKBONES) -> dict[str, str]:
    """Name of every model that packages of terrazzo register with timm, to its family.

    Package after package, each in natural order.
    """
    names = timm.list_models()
    found = ((name, family_of(name, (package,))) for package in packages for name in names)
    return {name: family for name, family in found if family is not None}


def check_name(name: str) -> None:
    """Refuse a model that timm does not know. A tag of weights may follow the name; it is not looked at.

    Raises:
        InputError: there is no such model; the message lists close names.
    """
    bare = name.split(".", 1)[0]
    if timm.models.is_model(bare):
        return
    close = difflib.get_close_matches(bare, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "`terrazzo list` and timm.list_models() name the models"
    raise InputError(f"no model is called {name!r}; {hint}")

"""Names of models: whether timm knows one, and of which family of terrazzo it is."""

import difflib

import timm

from terrazzo.errors import InputError


def family_of(name: str, package: str = "backbones") -> str | None:
    """The family (the stem of its file) in a package of terrazzo that registers model `name`; None for other models."""
    module = timm.models.model_entrypoint(name.split(".", 1)[0]).__module__
    family = module.rsplit(".", 1)[-1]
    return family if module.startswith(f"terrazzo.{package}.") and not family.startswith("_") else None


def registered_models() -> dict[str, str]:
    """Name of every model that terrazzo registers with timm, to its family; in natural order."""
    families = {name: family_of(name) for name in timm.list_models()}
    return {name: family for name, family in families.items() if family is not None}


def check_name(name: str) -> None:
    """Refuse a model that timm does not know. A tag of weights may follow the name; it is not looked at.

    Raises:
        InputError: there is no such model; the message lists close names, terrazzo's first.
    """
    bare = name.split(".", 1)[0]
    if timm.models.is_model(bare):
        return
    close = list(dict.fromkeys(difflib.get_close_matches(bare, [*registered_models(), *timm.list_models()], n=3)))
    hint = f"did you mean {', '.join(close)}?" if close else "`terrazzo list` and timm.list_models() name the models"
    raise InputError(f"no model is called {name!r}; {hint}")

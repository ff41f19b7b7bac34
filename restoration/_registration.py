"""Registration of restoration networks with timm: a configuration and a function for each variant."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from terrazzo.errors import InputError
from terrazzo.restoration._model import RestorationModel


class Purpose(NamedTuple):
    """What a network is for.

    Attributes:
        upscale: how many times larger its pictures become.
        tasks: as `RestorationModel.tasks`.
    """

    upscale: int
    tasks: tuple[str, ...]


_OF_CLASSIFIERS = ("num_classes", "global_pool", "features_only", "out_indices")


def restoration_cfg(size: int = 64, **about: Any) -> dict[str, Any]:
    """timm's configuration of a network that takes pictures in [0, 1] and normalises them itself.

    Args:
        size: Side of the pictures that the authors train with; networks take any size.
        **about: Further entries.
    """
    common = dict(
        num_classes=0,
        input_size=(3, size, size),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        crop_pct=1.0,
        interpolation="bicubic",
    )
    return {**common, **about}


def register_variants(
    module: str, model_cls: type[RestorationModel], variants: Mapping[str, Mapping[str, Any]]
) -> None:
    """Register variants with timm. Each becomes a function of its module, such as `rgt.rgt_s_x2(pretrained, ...)`.

    The module's `default_cfgs` and, if it has one, its `checkpoint_filter_fn` are found by these names.

    Args:
        module: `__name__` of the family's module.
        model_cls: The class of all these variants.
        variants: The name of each variant, and the arguments with which it calls the class. A user's arguments replace
            them.
    """
    for name, arguments in variants.items():
        entrypoint = _entrypoint(module, model_cls, name, dict(arguments))
        setattr(sys.modules[module], name, entrypoint)
        register_model(entrypoint)


def purpose_of(name: str) -> Purpose:
    """What a registered restoration network is for, without building it."""
    return timm.models.model_entrypoint(name).purpose


def _entrypoint(
    module: str, model_cls: type[RestorationModel], name: str, arguments: dict[str, Any]
) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        asked = [key for key in _OF_CLASSIFIERS if kwargs.pop(key, None)]
        if asked:
            raise InputError(f"{name} gives pictures, and no classes or maps of features: leave out {', '.join(asked)}")
        return build_model_with_cfg(
            model_cls,
            name,
            pretrained,
            pretrained_filter_fn=getattr(sys.modules[module], "checkpoint_filter_fn", None),
            kwargs_filter=("num_classes",),  # timm adds it from the configuration
            **{**arguments, **kwargs},
        )

    # timm registers a function by its name and module, and pickle finds it by them.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__annotations__["return"] = model_cls
    asked = inspect.signature(model_cls).bind_partial(**arguments)
    asked.apply_defaults()
    entrypoint.purpose = Purpose(asked.arguments.get("upscale", 1), model_cls.tasks)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    entrypoint.__doc__ = f"{model_cls.__name__} with {given}; the class's other arguments work, too."
    return entrypoint

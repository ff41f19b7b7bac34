"""Registration of a family with timm: a configuration for each set of weights, and a function for each variant.

timm's own files have a function for each variant; the functions differ only in numbers. Here a variant is a row of a
table, and `register_variants` makes the functions.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from terrazzo.backbones._feature_pyramid import STRIDES, plain_options
from terrazzo.backbones._plain import Plain
from terrazzo.errors import InputError


def imagenet_cfg(top1: float | str | None, **about: Any) -> dict[str, Any]:
    """timm's configuration of an ImageNet-1K classifier for images of 224 x 224 whose last map has stride 32.

    Args:
        top1: The accuracy that the authors published, in percent, or a text; None to leave it out.
        **about: Further entries. They may replace entries that are set here.
    """
    common = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        classifier="head.fc",
        notes=() if top1 is None else (f"published top-1: {top1}",),
    )
    return {**common, **about}


def register_variants(
    module: str,
    model_cls: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    out_indices: Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]] = (0, 1, 2, 3),
) -> None:
    """Register variants with timm. Each becomes a function of its module, such as `dinat.dinat_tiny(pretrained, ...)`.

    The module's `default_cfgs` and, if it has one, its `checkpoint_filter_fn` are found by these names.

    Args:
        module: `__name__` of the family's module.
        model_cls: The class of all these variants.
        variants: The name of each variant, and the arguments with which it calls the class. A user's arguments replace
            them.
        out_indices: Which maps `features_only` returns by default, or a function that derives this from the arguments.
            A variant may have a different `out_indices` among its arguments.
    """
    for name, arguments in variants.items():
        entrypoint = _entrypoint(module, model_cls, name, dict(arguments), out_indices)
        setattr(sys.modules[module], name, entrypoint)
        register_model(entrypoint)


def _entrypoint(
    module: str,
    model_cls: type[nn.Module],
    name: str,
    arguments: dict[str, Any],
    out_indices: Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]],
) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        kwargs = {**arguments, **kwargs}
        indices = out_indices(kwargs) if callable(out_indices) else out_indices
        if kwargs.get("output_fmt") and model_cls.gives_tokens:
            raise InputError(
                f"output_fmt is the layout of a map, and {name} gives tokens (B, T, C) from forward_features: leave it "
                "out; features_only=True gives maps"
            )
        plain = issubclass(model_cls, Plain)
        if not plain and kwargs.pop("pyramid", False):
            raise InputError(f"pyramid=True is for models with one stride, and {name} has several: leave it out")
        feature_cfg = plain_options(name, kwargs) if plain else {}
        if feature_cfg:
            indices = tuple(range(len(STRIDES)))
        return build_model_with_cfg(
            model_cls,
            name,
            pretrained,
            pretrained_filter_fn=getattr(sys.modules[module], "checkpoint_filter_fn", None),
            feature_cfg=dict(feature_cls="getter", out_indices=kwargs.pop("out_indices", indices)) | feature_cfg,
            **kwargs,
        )

    # timm registers a function by its name and module, and pickle finds it by them.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__annotations__["return"] = model_cls
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    entrypoint.__doc__ = f"{model_cls.__name__} with {given}; the class's other arguments work, too."
    return entrypoint

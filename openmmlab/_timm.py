"""Building timm models by name, with helpful errors, for both the backbone and the classifier wrapper."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from terrazzo.backbones._convert import convert_attention
from terrazzo.backbones._names import check_name
from terrazzo.backbones._reduce import reduce as reduce_tokens
from terrazzo.errors import InputError


def create_model(
    name: str,
    pretrained: bool = False,
    reduce: Mapping[str, Any] | None = None,
    convert: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered timm model; models with a fixed input size are built for any size if they can be.

    Args:
        name: the name of a model, as in `timm.list_models()`.
        pretrained: whether to load the weights that timm knows.
        reduce: arguments of `terrazzo.reduce` for a plain ViT; None for all tokens in all blocks.
        convert: arguments of `terrazzo.convert_attention` for a plain ViT, or several of these for different layers;
            None for softmax attention.
        **kwargs: arguments of the model.

    Raises:
        InputError: if the model or its weights do not exist, or it does not take an argument, or it is no plain ViT and
            is to be reduced or converted.
    """
    model = _built(name, pretrained, kwargs)
    changes = [convert] if isinstance(convert, Mapping) else list(convert or ())
    for what, change, arguments in (
        *(("convert", convert_attention, arguments) for arguments in changes),
        *((("reduce", reduce_tokens, reduce),) if reduce is not None else ()),
    ):
        try:
            change(model, **arguments)
        except TypeError as error:
            raise InputError(f"{what}={dict(arguments)} of model '{name}' does not fit: {error}") from error
    return model


def _built(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    check_name(name)
    flexible: list[dict] = [{}]
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        flexible = [{"strict_img_size": False}, {"dynamic_img_size": True, "dynamic_img_pad": True}, {}]
    for extra in flexible:
        try:
            return timm.create_model(name, pretrained=pretrained, **{**extra, **kwargs})
        except TypeError as error:
            if any(f"'{key}'" in str(error) for key in extra if key not in kwargs):
                continue
            if "unexpected keyword argument" in str(error):
                raise InputError(f"model '{name}' does not take these arguments: {error}") from error
            raise
        except RuntimeError as error:
            if pretrained and "No pretrained weights" in str(error):
                raise InputError(f"{error}; set pretrained=False or name a file as checkpoint") from error
            raise
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the weights of '{name}' could not be fetched ({reason}); set pretrained=False, or name a file "
                "as checkpoint"
            ) from error
    raise AssertionError("the last attempt adds no argument of its own, so it returns or raises")

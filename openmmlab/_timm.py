"""Building timm models by name, with helpful errors, for both the backbone and the classifier wrapper."""

from typing import Any

import timm
from torch import nn

from terrazzo.backbones._names import check_name
from terrazzo.errors import InputError


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a registered timm model; models with a fixed input size are built for any size if they can be.

    Args:
        name: the name of a model, as in `timm.list_models()`.
        pretrained: whether to load the weights that timm knows.
        **kwargs: arguments of the model.

    Raises:
        InputError: if the model or its weights do not exist, or it does not take an argument.
    """
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

"""Building timm models by name, with errors that help: what the backbone and the classifier wrapper share."""

import difflib
import re
import sys
from typing import Any

import timm
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import load_file


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a registered timm model; models with a fixed input size are asked to take any size, where they can.

    Args:
        name: the name of a model, as in `timm.list_models()`.
        pretrained: whether to load the weights that timm knows of.
        **kwargs: arguments of the model.

    Raises:
        InputError: if there is no such model, it has no such weights, or it does not take an argument.
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


def check_name(name: str) -> None:
    """Checks that timm knows a model.

    Raises:
        InputError: if it does not; the message lists close names.
    """
    base = name.split(".")[0]
    if not timm.is_model(base):
        known = timm.list_models()
        close = difflib.get_close_matches(base, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
        raise InputError(f"there is no model '{name}' among the {len(known)} that timm and terrazzo register; {hint}")


def is_ours(name: str) -> bool:
    """Whether a model is terrazzo's own, so that it knows `norm_outputs`, and not timm's."""
    return timm.models.model_entrypoint(name.split(".")[0]).__module__.startswith("terrazzo.")


def load_weights(model: nn.Module, name: str, filename: str, optional: str = r"^$") -> None:
    """Loads a checkpoint into a model: an official file, or one of a detector or classifier trained here.

    The names of official files are mapped by the `checkpoint_filter_fn` of the model's family, if it has one.

    Args:
        model: the model.
        name: its registered name.
        filename: a `.pth` or `.safetensors` file.
        optional: a pattern of parameters that the file may lack.

    Raises:
        InputError: if the file cannot be read, or lacks parameters of the model, or has them in other shapes.
    """
    state = load_file(filename, "cpu")
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise InputError(f"checkpoint '{filename}' holds a {type(state).__name__}, not named tensors")
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for prefix in ("backbone.model.", "backbone."):
        inner = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        state = inner or state
        if inner:
            break
    module = sys.modules[timm.models.model_entrypoint(name.split(".")[0]).__module__]
    if hasattr(module, "checkpoint_filter_fn"):
        state = module.checkpoint_filter_fn(state, model)
    own = model.state_dict()
    needed = [key for key in own if not re.search(optional, key)]
    missing = [key for key in needed if key not in state]
    shapes = [key for key in needed if key in state and state[key].shape != own[key].shape]
    for what, keys in (("lacks", missing), ("has in another shape", shapes)):
        if keys:
            raise InputError(
                f"checkpoint '{filename}' does not fit model '{name}': it {what} {len(keys)} of {len(own)} tensors, "
                f"such as {', '.join(keys[:3])}; name a checkpoint of this model"
            )
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)

"""Building timm models by name, with helpful errors, for both the backbone and the classifier wrapper."""

import difflib
from typing import Any

import timm
from torch import nn

from terrazzo.backbones._weights import filter_of, fitted, misfit, say_licence, weights_of
from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import load_file


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
    """Loads a checkpoint into a model: an official file, or a file of a detector or classifier trained here.

    The `checkpoint_filter_fn` of the model's family, if it has one, maps the names of official files. The prefixes of
    detectors, wrappers and Lightning's modules are removed.

    Args:
        model: the model.
        name: its registered name.
        filename: a `.pth` or `.safetensors` file.
        optional: a pattern of parameters that the file may lack.

    Raises:
        InputError: if the file cannot be read, or lacks parameters of the model, or has them in other shapes.
    """
    checkpoint = load_file(filename, "cpu")
    try:
        weights = weights_of(checkpoint)
        found = fitted(weights, model, filter_of(name))
    except InputError as error:
        raise InputError(f"checkpoint '{filename}' {str(error).removeprefix('the checkpoint ')}") from error
    say_licence(weights)
    if complaint := misfit(weights, found, model, name, optional):
        raise InputError(f"checkpoint '{filename}' {complaint}")
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in found.items() if k in own and v.shape == own[k].shape}, strict=False)

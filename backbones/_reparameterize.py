"""`terrazzo.reparameterize`: turn a trained model into its form for inference."""

from typing import Any

from torch import nn

from terrazzo.errors import InputError

_IN_PLACE = ("reparameterize", "switch_to_deploy")


def reparameterize(model: nn.Module) -> nn.Module:
    """Join branches, norms and convolutions that are separate for training only, and return the model.

    The model is changed in place, and computes the same up to rounding; it has fewer parameters, with other names, and
    cannot be trained further as the paper trains it. FMViT of terrazzo has this form, and RepVGG, MobileOne, RepViT,
    FastViT, LeViT and others of timm. Other models stay as they are, and a second call changes nothing.

        model = terrazzo.reparameterize(timm.create_model("fmvit_small").eval())

    A module takes part if its class has a method that timm knows: `fuse`, which returns a module to put in its place,
    or `reparameterize` or `switch_to_deploy`, which change it.

    Raises:
        InputError: The model is in training mode, in which batch norm does not use its stored statistics.
    """
    if model.training:
        raise InputError("layers are joined with the stored statistics of batch norm: call model.eval() first")
    _change(model)
    _visit(model)
    return model


def _visit(model: nn.Module) -> None:
    # timm's `reparameterize_model` also calls layers and flags that have a method's name, and passes over the root.
    children: list[tuple[str, Any]] = list(model.named_children())
    for name, child in children:
        if _has(child, "fuse"):
            setattr(model, name, child.fuse())
        else:
            _change(child)
        _visit(getattr(model, name))


def _change(module: nn.Module) -> None:
    method = next((name for name in _IN_PLACE if _has(module, name)), None)
    if method is not None:
        getattr(module, method)()


def _has(module: nn.Module, method: str) -> bool:
    """Whether the class has a method of this name; a layer or a flag of this name is something else."""
    return callable(getattr(type(module), method, None))

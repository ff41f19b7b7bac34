"""Loads the weights of a checkpoint file into a timm model."""

from collections.abc import Callable

from torch import nn

from terrazzo.backbones._weights import filter_of, fitted, misfit, say_licence, weights_of
from terrazzo.checkpoints.files import load_file
from terrazzo.checkpoints.records import Record, arguments, check_changes, recorded, say_left_out
from terrazzo.errors import InputError


def load_weights(
    model: nn.Module,
    name: str,
    filename: str,
    optional: str = r"^$",
    advice: Callable[[nn.Module, Record], str] | None = arguments,
) -> None:
    """Loads a checkpoint into a model: an official file, or a file of a detector or classifier trained here.

    The `checkpoint_filter_fn` of the model's family, if it has one, maps the names of official files. The prefixes of
    detectors, wrappers and Lightning's modules are removed.

    Args:
        model: the model.
        name: its registered name.
        filename: a `.pth` or `.safetensors` file.
        optional: a pattern of parameters that the file may lack.
        advice: see `check_changes`; None if the model may have other mixers than the file's record says.

    Raises:
        InputError: if the file cannot be read, is of a model with other mixers or another token reduction, or lacks
            parameters of the model, or has them in other shapes.
    """
    checkpoint = load_file(filename, "cpu")
    if advice is not None:
        check_changes(model, recorded(checkpoint, filename), filename, advice)
    try:
        weights = weights_of(checkpoint)
        found = fitted(weights, model, filter_of(name))
    except InputError as error:
        raise InputError(f"checkpoint '{filename}' {str(error).removeprefix('the checkpoint ')}") from error
    say_licence(weights)
    if complaint := misfit(weights, found, model, name, optional):
        raise InputError(f"checkpoint '{filename}' {complaint}")
    say_left_out(weights, model, filename)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in found.items() if k in own and v.shape == own[k].shape}, strict=False)

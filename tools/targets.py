"""What a user may name to `infer` and `export`: a timm model or an OpenMMLab config, with or without weights."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from terrazzo.backbones._hosts import ADDED
from terrazzo.checkpoints.loading import load_weights
from terrazzo.checkpoints.records import command
from terrazzo.errors import InputError, first_line
from terrazzo.tools.mechanisms import Mechanism, changed
from terrazzo.tools.models import options_for, require_model


def is_config(name: str) -> bool:
    """Whether `name` means a config rather than a timm model."""
    if timm.models.is_model(name.split(".", 1)[0]) and not Path(name).is_file():
        return False
    if name.endswith(".py") or "/" in name or Path(name).exists():
        return True
    try:
        from terrazzo.openmmlab.config import packaged_configs
    except ModuleNotFoundError:  # without mmengine there are no configs, and timm models still work
        require_model(name)
        return False
    if name in packaged_configs():
        return True
    try:
        require_model(name)
    except InputError as error:
        raise InputError(f"{error}; nor is there a config called {name!r}") from None
    return False


def load_timm_model(
    name: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    size: tuple[int, int] | str | None = None,
    changes: Sequence[Mechanism] = (),
    any_record: bool = False,
) -> nn.Module:
    """Build a timm classifier in evaluation mode, on the CPU.

    Args:
        name: a timm model name.
        checkpoint: a file of weights, official or trained here.
        pretrained: download the weights that timm knows of.
        num_classes: classes of the head; None for the model's own number.
        size: (H, W) of the images, if it is not the size of the weights, or "any".
        changes: change the model, in this order; the checkpoint may have or lack what they add.
        any_record: whether the checkpoint may be of a model with other mixers or another token reduction, because the
            caller compares changed copies of this model.

    Raises:
        InputError: unknown name, weights that cannot be downloaded, a checkpoint that cannot be read or does not fit,
            or a change that does not fit the model.
    """
    require_model(name)
    if checkpoint is not None and pretrained:
        raise InputError("a checkpoint and --pretrained both name weights; give one of them")
    options = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None:
        options |= options_for(name, size)
    if pretrained:
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub's clients fail in many ways: no network, no file, no weights
            raise InputError(
                f"the weights of {name} cannot be downloaded: {first_line(error)}; name a file of weights"
            ) from error
        return changed(model, changes)
    model = changed(timm.create_model(name, **options), changes)
    if checkpoint is not None:
        optional = ADDED if changes else "^$"
        load_weights(model, name, str(checkpoint), optional, advice=None if any_record else command)
    return model


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None means a GPU if there is one, else the CPU. InputError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device {name!r} cannot be used: {first_line(error)}; leave --device out or name cpu"
        ) from error
    return device

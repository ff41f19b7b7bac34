"""Checkpoints as plain data: they load with `torch.load(weights_only=True)`, and loading never runs code.

`terrazzo.checkpoints` reads files, and `addresses` fetches them from the web.
"""

import collections
import io
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch
from mmengine.fileio import get_file_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import HistoryBuffer, MessageHub, print_log
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader
from torch.nn.parameter import UninitializedTensorMixin

from terrazzo.checkpoints import files
from terrazzo.checkpoints._pickles import DEPTH, Refused, check_key
from terrazzo.checkpoints.files import save_file
from terrazzo.checkpoints.records import arguments, check_changes, recorded
from terrazzo.errors import InputError

HISTORY = "terrazzo.history"
"""The key that marks a dict as a saved HistoryBuffer."""

WRAPPED = ((r"^module\.", ""),)
"""The prefix of a wrapper's weights and what takes its place, as mmengine's functions have it by default."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Tensor, torch.Size, torch.dtype)
PLAIN += (torch.device, torch.layout)


def plain(value: Any, where: str = "checkpoint", depth: int = 0) -> Any:
    """Copies a nested structure into dicts, lists, tuples, numbers, text and tensors, which load without any class.

    NumPy scalars become numbers, arrays become nested lists, and mmengine's histories become dicts of tensors. A value
    without a plain form becomes its `repr`, with a warning, so that it does not end a training run.

    Args:
        value: the value to save.
        where: the place of the value in the checkpoint, for the warning.
        depth: the depth of that place; values nested deeper than a checkpoint allows become text, too.
    """
    if depth > DEPTH:
        print_log(f"{where[:100]}... is nested more than {DEPTH} deep and is left out", logger="current")
        return f"<{type(value).__name__}>"
    if isinstance(value, HistoryBuffer):
        logs, counts = value.data
        histories = {"log": torch.as_tensor(np.asarray(logs)), "count": torch.as_tensor(np.asarray(counts))}
        return {HISTORY: True, "max_length": value.max_length, **histories}
    if isinstance(value, torch.Tensor):
        return value.detach() if type(value) is torch.nn.Parameter else value
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where, depth)
    if isinstance(value, dict):
        copy = collections.OrderedDict() if isinstance(value, collections.OrderedDict) else {}
        copy.update(
            (_plain_key(key, where), plain(item, f"{where}[{key!r}]", depth + 1)) for key, item in value.items()
        )
        if hasattr(value, "_metadata"):  # the versions that PyTorch keeps beside a state dict
            copy._metadata = plain(dict(value._metadata), where)
        return copy
    if isinstance(value, tuple):
        return tuple(plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value))
    if isinstance(value, (list, set, frozenset, collections.deque)):
        return [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    for base in (bool, int, float, str):  # subclasses, for example enums of numbers and text
        if isinstance(value, base):
            return base(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    print_log(f"{where} is a {type(value).__name__} and is saved as its text", logger="current")
    return repr(value)


def _plain_key(key: Any, where: str) -> Any:
    """A key of a dict in its plain form, or its text if a checkpoint may not have that key."""
    try:
        return check_key(plain(key, where))
    except Refused:
        return repr(key)


def save_checkpoint(
    checkpoint: dict, filename: str, file_client_args: dict | None = None, backend_args: dict | None = None
) -> None:
    """Saves a checkpoint as plain data. A local file appears under its name only when it is complete.

    Args:
        checkpoint: anything; see `plain`. A `.safetensors` file takes only the weights: the tensors of `state_dict`, or
            of the checkpoint itself.
        filename: a path, or an address that one of mmengine's file backends understands.
        file_client_args: mmengine's old name of `backend_args`.
        backend_args: arguments of the file backend.

    Raises:
        SavingError: if the file cannot be written; an earlier file of that name stays unchanged.
    """
    checkpoint = plain(checkpoint)
    backend = get_file_backend(filename, backend_args=backend_args or file_client_args)
    if not isinstance(backend, LocalBackend):
        with io.BytesIO() as buffer:
            torch.save(checkpoint, buffer)
            backend.put(buffer.getvalue(), filename)
        return
    save_file(checkpoint, pathlib.Path(filename))


def load_file(filename: str | os.PathLike, map_location: Any = None) -> Any:
    """`terrazzo.checkpoints.files.load_file` with mmengine's own class for logged values."""
    return files.load_file(filename, map_location, HistoryBuffer)


def load_bytes(content: bytes, name: str, map_location: Any = None) -> Any:
    """As `load_file`, from the bytes of a `.pth` file; `name` is for the message."""
    return files.load_bytes(content, name, map_location, HistoryBuffer)


def install() -> None:
    """Makes mmengine save and load through this module. A second call changes nothing."""
    for module in (mmengine.runner, mmengine.runner.runner, mmengine.runner.checkpoint):
        module.save_checkpoint = save_checkpoint
    mmengine.runner.checkpoint.load_from_local = load_from_local
    mmengine.runner.load_checkpoint = mmengine.runner.checkpoint.load_checkpoint = load_checkpoint
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    if not hasattr(MessageHub.load_state_dict, "original"):
        MessageHub.load_state_dict = _reading_histories(MessageHub.load_state_dict)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """mmengine's loader of files; see `load_file`."""
    return load_file(filename, map_location)


def load_checkpoint(
    model: torch.nn.Module,
    filename: str,
    map_location: Any = None,
    strict: bool = False,
    logger: Any = None,
    revise_keys: Sequence[tuple[str, str]] = WRAPPED,
) -> dict:
    """mmengine's function, which loads what fits and only logs the rest; this also compares the record of mixers.

    Raises:
        InputError: the checkpoint is of a model with other mixers or another token reduction; see `check_changes`. Or
            it has no weight of the model.
    """
    mm = mmengine.runner.checkpoint
    checkpoint = mm._load_checkpoint(filename, map_location, logger)
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint '{filename}' holds a {type(checkpoint).__name__}, and weights are in a dict")
    check_changes(model, recorded(checkpoint, filename), filename, arguments)
    check_weights(model, checkpoint, filename, revise_keys)
    return mm._load_checkpoint_to_model(model, checkpoint, strict, logger, list(revise_keys))


def check_weights(
    model: torch.nn.Module, checkpoint: dict, filename: str, revise_keys: Sequence[tuple[str, str]] = WRAPPED
) -> None:
    """Checks that a checkpoint has at least one weight of a model: mmengine only logs what does not fit.

    Args:
        model: the model that gets the weights, or a wrapper around it.
        checkpoint: the content of the file.
        filename: the file, for the message.
        revise_keys: patterns in the names of the file, and what takes their place.

    Raises:
        InputError: no tensor has the name and the shape of a weight.
    """
    own = {name.removeprefix("module."): value.shape for name, value in model.state_dict().items() if _has_shape(value)}
    weights = checkpoint.get("state_dict", checkpoint)
    found: dict[str, Any] = {}
    for name, value in weights.items() if isinstance(weights, dict) else ():
        for pattern, replacement in revise_keys:
            name = re.sub(pattern, replacement, name)
        found[name] = value

    def fits() -> bool:
        return any(name in own and _has_shape(value) and value.shape == own[name] for name, value in found.items())

    if not own or fits():
        return
    _rename(model, found)
    if not fits():
        raise InputError(
            f"checkpoint '{filename}' has no weight of this model; for an official file set "
            f"model.backbone.checkpoint={filename}"
        )


def _rename(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Give weights the names that the model's own hooks give them when it loads them."""
    for prefix, module in model.named_modules():
        for hook in module._load_state_dict_pre_hooks.values():
            hook(weights, f"{prefix}." if prefix else "", {}, True, [], [], [])


def _has_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, UninitializedTensorMixin)


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class CheckedPretrained(PretrainedInit):
    """mmengine's `init_cfg=dict(type="Pretrained", checkpoint=FILE)`, which also compares the record of mixers."""

    def __call__(self, module: torch.nn.Module) -> None:
        """Loads the weights, or with a prefix a part of them, into a module.

        Raises:
            InputError: see `load_checkpoint`.
        """
        if self.prefix is not None:  # else mmengine calls `load_checkpoint`
            saved = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location)
            check_changes(module, recorded(saved, self.checkpoint), self.checkpoint, arguments)
        super().__call__(module)


def _history(value: Any) -> Any:
    """Turns a saved history back into a HistoryBuffer; mmengine's own form needs no change."""
    if not isinstance(value, dict) or not value.get(HISTORY):
        return value
    log, count, length = (value.get(key) for key in ("log", "count", "max_length"))
    tensors = isinstance(log, torch.Tensor) and isinstance(count, torch.Tensor)
    if not tensors or log.dim() != 1 or log.shape != count.shape or type(length) is not int or length < 1:
        raise InputError("a log history in the checkpoint is malformed; resume from another checkpoint")
    return HistoryBuffer(log.cpu().numpy(), count.cpu().numpy(), length)


def _reading_histories(original: Callable) -> Callable:
    """Wraps `MessageHub.load_state_dict` so that it takes histories in any of their forms."""

    def load_state_dict(self: MessageHub, state_dict: dict | MessageHub) -> None:
        if isinstance(state_dict, dict) and "log_scalars" in state_dict:
            scalars = {name: _history(value) for name, value in state_dict["log_scalars"].items()}
            state_dict = {**state_dict, "log_scalars": scalars}
        original(self, state_dict)

    load_state_dict.original = original
    return load_state_dict

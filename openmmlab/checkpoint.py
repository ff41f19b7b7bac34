"""Checkpoints as plain data: they load with `torch.load(weights_only=True)`, and loading never runs code.

`_archives` reads the format of a file, `_pickles` its objects, and `addresses` fetches files from the web.
"""

import collections
import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch
from mmengine.fileio import get_file_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import HistoryBuffer, MessageHub, print_log
from mmengine.runner.checkpoint import CheckpointLoader

from terrazzo._files import written_whole
from terrazzo.errors import InputError, SavingError
from terrazzo.openmmlab import _archives
from terrazzo.openmmlab._pickles import DEPTH, Refused, check_key

HISTORY = "terrazzo.history"
"""The key that marks a dict as a saved HistoryBuffer."""

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
    path = pathlib.Path(filename)
    try:
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(_safetensors(checkpoint))
            else:
                torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch.save turns the failures of a file into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:200]
        raise SavingError(
            f"checkpoint '{path}' could not be written: {reason}; earlier checkpoints are whole: make room and resume"
        ) from error


def _safetensors(checkpoint: dict) -> bytes:
    """The weights of a checkpoint in the safetensors format."""
    import safetensors.torch

    state = checkpoint.get("state_dict", checkpoint)
    other = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise InputError(f"a .safetensors file holds only tensors, and {other[0]!r} is not a tensor; save as .pth")
    # Tied weights share memory, which the format refuses.
    return safetensors.torch.save({key: value.cpu().contiguous().clone() for key, value in state.items()})


def load_file(filename: str | os.PathLike, map_location: Any = None) -> Any:
    """Loads a checkpoint file without ever running code from it: plain data, arrays, tensors and OpenMMLab's histories.

    PyTorch's reader of pickles is not used (see `terrazzo.openmmlab._pickles`), and neither are the names that a
    program added with `torch.serialization.add_safe_globals`: these names do not extend what is loaded here, and they
    stay registered. Attributes of tensors are left out. A file is refused if its pickle has more than 512 MiB or 10
    million operations, if its dicts and lists are nested more than 100 deep, if it is a compressed archive, or if its
    arrays and tensors claim more than 8 times the bytes of the file plus 64 MiB.

    Args:
        filename: a `.pth` file, or a `.safetensors` file, which gives its tensors.
        map_location: as in `torch.load`.

    Raises:
        InputError: if the file does not exist, is not a checkpoint, or holds other objects; the message names them.
    """
    path = pathlib.Path(filename).expanduser()
    if not path.is_file():
        raise InputError(f"checkpoint '{filename}' does not exist; name a .pth or .safetensors file")
    place = functools.partial(_place, map_location)
    with _refusing(filename):
        if path.suffix == ".safetensors":
            import safetensors.torch

            tensors = safetensors.torch.load_file(path)
            on_cpu = map_location is None or str(map_location) == "cpu"
            return tensors if on_cpu else {key: _moved(tensor, place) for key, tensor in tensors.items()}
        with open(path, "rb") as file:
            return _archives.read(file, place)


def load_bytes(content: bytes, name: str, map_location: Any = None) -> Any:
    """As `load_file`, from the bytes of a `.pth` file; `name` is for the message."""
    with _refusing(name):
        return _archives.read(io.BytesIO(content), functools.partial(_place, map_location))


@contextlib.contextmanager
def _refusing(filename: str | os.PathLike) -> Iterator[None]:
    """Turns every error that a file causes into an InputError of one line."""
    try:
        yield
    except Refused as error:
        raise InputError(f"checkpoint '{filename}' is refused: {error}") from error
    except (
        Exception
    ) as error:  # foreign bytes fail in many ways, and safetensors' own errors derive only from Exception
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"checkpoint '{filename}' is refused: it is not a checkpoint that can be read ({said})"
        ) from error


def _place(map_location: Any, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    """The bytes of a tensor that was at `location`, on the device where `torch.load` would put it."""
    restore = torch.serialization.default_restore_location
    if isinstance(map_location, (str, torch.device)):  # a device is callable, too
        return restore(storage, str(map_location))
    if isinstance(map_location, dict):
        return restore(storage, str(map_location.get(location, location)))
    moved = None if map_location is None else map_location(storage, location)
    return restore(storage, location) if moved is None else moved


def _moved(tensor: torch.Tensor, place: _archives.Place) -> torch.Tensor:
    """A CPU tensor, moved to where `place` puts it."""
    storage = place(tensor.contiguous().clone().untyped_storage(), "cpu")
    return torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(storage, 0, tensor.shape)


def install() -> None:
    """Makes mmengine save and load through this module. A second call changes nothing."""
    for module in (mmengine.runner, mmengine.runner.runner, mmengine.runner.checkpoint):
        module.save_checkpoint = save_checkpoint
    mmengine.runner.checkpoint.load_from_local = load_from_local
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    if not hasattr(MessageHub.load_state_dict, "original"):
        MessageHub.load_state_dict = _reading_histories(MessageHub.load_state_dict)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """mmengine's loader of files; see `load_file`."""
    return load_file(filename, map_location)


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

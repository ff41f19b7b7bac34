"""Checkpoints as plain data: they load with `torch.load(weights_only=True)`, and loading never runs code."""

import collections
import io
import os
import pathlib
import urllib.parse
import zipfile
from collections.abc import Callable
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch
from mmengine.dist import get_dist_info, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import HistoryBuffer, MessageHub, print_log
from mmengine.runner.checkpoint import CheckpointLoader

from terrazzo._files import written_whole
from terrazzo.errors import InputError, SavingError

HISTORY = "terrazzo.history"
"""The key that marks a dict as a saved HistoryBuffer."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.Size, torch.dtype, torch.device)


def plain(value: Any, where: str = "checkpoint") -> Any:
    """Copies a nested structure into dicts, lists, tuples, numbers, text and tensors, which load without any class.

    NumPy scalars become numbers, arrays nested lists, mmengine's histories dicts of tensors. Anything that has no plain
    form becomes its `repr`, with a warning: a training run does not die for it.

    Args:
        value: what is to be saved.
        where: the place of the value in the checkpoint, for the warning.
    """
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
        return plain(value.tolist(), where)
    if isinstance(value, dict):
        copy = collections.OrderedDict() if isinstance(value, collections.OrderedDict) else {}
        copy.update((plain(key, where), plain(item, f"{where}[{key!r}]")) for key, item in value.items())
        if hasattr(value, "_metadata"):  # the versions that PyTorch keeps beside a state dict
            copy._metadata = plain(dict(value._metadata), where)
        return copy
    if isinstance(value, tuple):
        return tuple(plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, (list, set, frozenset, collections.deque)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    for base in (bool, int, float, str):  # subclasses, such as enums of numbers and text
        if isinstance(value, base):
            return base(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    print_log(f"{where} is a {type(value).__name__} and is saved as its text", logger="current")
    return repr(value)


def save_checkpoint(
    checkpoint: dict, filename: str, file_client_args: dict | None = None, backend_args: dict | None = None
) -> None:
    """Saves a checkpoint as plain data. A local file appears under its name only when it is complete.

    Args:
        checkpoint: anything; see `plain`. A `.safetensors` file takes the weights alone: the tensors of `state_dict`,
            or of the checkpoint itself.
        filename: a path, or an address that one of mmengine's file backends understands.
        file_client_args: mmengine's old name of `backend_args`.
        backend_args: arguments of the file backend.

    Raises:
        SavingError: if the file cannot be written; one of that name that was there before is as it was.
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
        raise InputError(f"a .safetensors file holds tensors alone, and {other[0]!r} is none; save as .pth")
    # Tied weights share memory, which the format refuses.
    return safetensors.torch.save({key: value.cpu().contiguous().clone() for key, value in state.items()})


def load_file(filename: str | os.PathLike, map_location: Any = None) -> Any:
    """Loads a checkpoint file without ever running code from it: plain data, tensors and OpenMMLab's log histories.

    Args:
        filename: a `.pth` file, or a `.safetensors` file, whose tensors are returned.
        map_location: as in `torch.load`.

    Raises:
        InputError: if the file does not exist, is no checkpoint, or holds other objects; the message names them.
    """
    path = pathlib.Path(filename).expanduser()
    if not path.is_file():
        raise InputError(f"checkpoint '{filename}' does not exist; name a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path, device=str(map_location or "cpu"))
        except Exception as error:  # safetensors' own errors derive from Exception alone
            raise InputError(f"checkpoint '{filename}' is refused: {_unreadable(error)}") from error
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler fails in many ways on foreign bytes
        raise InputError(f"checkpoint '{filename}' is refused: {_reason(path, error)}") from error


def _check_sums(path: pathlib.Path) -> None:
    """Compares the parts of a checkpoint with their check sums, which PyTorch writes and does not read.

    Raises:
        zipfile.BadZipFile: if one differs.
    """
    if not zipfile.is_zipfile(path):
        return  # PyTorch's format before 1.6
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"the check sum of {broken} is wrong: the file was damaged after it was written")


def install() -> None:
    """Makes mmengine save and load through this module. Doing so again changes nothing."""
    for module in (mmengine.runner, mmengine.runner.runner, mmengine.runner.checkpoint):
        module.save_checkpoint = save_checkpoint
    mmengine.runner.checkpoint.load_from_local = load_from_local
    mmengine.runner.checkpoint.load_from_http = load_from_http
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=("http://", "https://"), loader=load_from_http, force=True)
    if not hasattr(MessageHub.load_state_dict, "original"):
        MessageHub.load_state_dict = _reading_histories(MessageHub.load_state_dict)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """mmengine's loader of files; see `load_file`."""
    return load_file(filename, map_location)


def load_from_http(
    filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = False
) -> Any:
    """mmengine's loader of addresses: the first process downloads into PyTorch's cache, and all load from there."""
    folder = pathlib.Path(model_dir or os.path.join(torch.hub.get_dir(), "checkpoints"))
    path = folder / pathlib.PurePosixPath(urllib.parse.urlparse(filename).path).name
    if is_main_process() and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(filename, str(path), progress=progress)
    if get_dist_info()[1] > 1:
        torch.distributed.barrier()
    return load_file(path, map_location)


class _History:
    """What an OpenMMLab checkpoint's HistoryBuffer is read into: it keeps the numbers and drops the methods."""

    def __setstate__(self, state: dict) -> None:
        self.log = np.asarray(state.get("_log_history", ()))
        self.count = np.asarray(state.get("_count_history", ()))
        self.max_length = int(state.get("max_length", 1000000))


def _no_attribute(*args: Any) -> None:
    """Stands for `getattr`, by which histories refer to their methods; those are not restored."""


def _allowed() -> list:
    """What a foreign checkpoint may name: NumPy's arrays and numbers, and histories, read into `_History`."""
    core = np.core if np.lib.NumpyVersion(np.__version__) < "2.0.0" else np._core
    allowed: list = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [
            (core.multiarray._reconstruct, f"{package}._reconstruct"),
            (core.multiarray.scalar, f"{package}.scalar"),
        ]
    allowed += [(_History, "mmengine.logging.history_buffer.HistoryBuffer"), (_no_attribute, "builtins.getattr")]
    allowed += [(_no_attribute, "__builtin__.getattr"), (_encode, "_codecs.encode")]
    return allowed


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `codecs.encode`, by which old pickles write the bytes of an array."""
    if encoding != "latin1":
        raise InputError(f"encoding '{encoding}' in a checkpoint; only latin1 is used for bytes")
    return text.encode("latin1")


def _reason(path: pathlib.Path, error: Exception) -> str:
    """Why a file cannot be loaded, in one line."""
    with torch.serialization.safe_globals(_allowed()):
        try:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # not a zip archive, or broken
            found = []
    if found:
        return (
            f"it holds objects other than plain data, tensors and log histories ({', '.join(sorted(found))}), and "
            "loading them could run code; save its state_dict alone where it was made"
        )
    return _unreadable(error)


def _unreadable(error: Exception) -> str:
    return f"it is not a checkpoint that can be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _history(value: Any) -> Any:
    """Turns a saved history, in terrazzo's form or in mmengine's, back into a HistoryBuffer."""
    if isinstance(value, dict) and value.get(HISTORY):
        return HistoryBuffer(value["log"].cpu().numpy(), value["count"].cpu().numpy(), value["max_length"])
    if isinstance(value, _History):
        return HistoryBuffer(value.log, value.count, value.max_length)
    return value


def _reading_histories(original: Callable) -> Callable:
    """Wraps `MessageHub.load_state_dict` so that it takes histories in any of their forms."""

    def load_state_dict(self: MessageHub, state_dict: dict | MessageHub) -> None:
        if isinstance(state_dict, dict) and "log_scalars" in state_dict:
            scalars = {name: _history(value) for name, value in state_dict["log_scalars"].items()}
            state_dict = {**state_dict, "log_scalars": scalars}
        original(self, state_dict)

    load_state_dict.original = original
    return load_state_dict

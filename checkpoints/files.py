"""Checkpoint files: loading one never runs code from it, and a saved one is whole or not there."""

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from terrazzo._files import written_whole
from terrazzo.checkpoints import _archives
from terrazzo.checkpoints._pickles import History, Refused
from terrazzo.checkpoints.records import metadata_of, recorded
from terrazzo.errors import InputError, SavingError


def load_file(filename: str | os.PathLike, map_location: Any = None, history: _archives.MakeHistory = History) -> Any:
    """Loads a checkpoint file without ever running code from it: plain data, arrays, tensors and OpenMMLab's histories.

    PyTorch's reader of pickles is not used (see `terrazzo.checkpoints._pickles`), and neither are the names that a
    program added with `torch.serialization.add_safe_globals`: these names do not extend what is loaded here, and they
    stay registered. Attributes of tensors are left out. A file is refused if its pickle has more than 512 MiB or 10
    million operations, if its dicts and lists are nested more than 100 deep, if it is a compressed archive, or if its
    arrays and tensors claim more than 8 times the bytes of the file plus 64 MiB.

    Args:
        filename: a `.pth` file, or a `.safetensors` file, which gives its tensors.
        map_location: as in `torch.load`.
        history: the class for OpenMMLab's logs of values; it takes values, counts and the largest length.

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
            return _archives.read(file, place, history)


def load_bytes(content: bytes, name: str, map_location: Any = None, history: _archives.MakeHistory = History) -> Any:
    """`load_file` for the bytes of a `.pth` file; messages use `name`."""
    with _refusing(name):
        return _archives.read(io.BytesIO(content), functools.partial(_place, map_location), history)


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


def save_file(checkpoint: dict, path: pathlib.Path) -> None:
    """Saves a checkpoint of plain data. The file appears under its name only when it is complete.

    Args:
        checkpoint: what is saved; a `.safetensors` file takes the tensors of its `state_dict`, or its own tensors, and
            the record of the model's mixers and token reduction in its `meta`.
        path: a `.pth` or `.safetensors` file.

    Raises:
        SavingError: if the file cannot be written; an earlier file of that name stays as it was.
    """
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
    tensors = {key: value.cpu().contiguous().clone() for key, value in state.items()}
    return safetensors.torch.save(tensors, metadata_of(recorded(checkpoint)) or None)

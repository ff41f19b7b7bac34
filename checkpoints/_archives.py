"""The two formats of `torch.save`, a zip archive and the format before PyTorch 1.6, read without PyTorch's reader."""

import collections
import io
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from terrazzo.checkpoints._pickles import History, Kind, Reader, Refused, Stored

PICKLE_BYTES = 512 * 2**20
"""How large the pickle of an archive may be: it has names and numbers, and tensors are stored beside it."""

GROWTH = 8
"""How many times the file's size all arrays and tensors may have: tied and expanded weights repeat bytes."""

_SPARE = 64 * 2**20
"""How many bytes a small file may have beyond that."""

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

Place = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]
MakeHistory = Callable[[Any, Any, int], Any]


def read(file: BinaryIO, place: Place, history: MakeHistory = History) -> Any:
    """What `torch.save` wrote.

    Args:
        file: opened for reading bytes, with `seek`.
        place: moves the bytes of tensors to a device; it takes the bytes and the name of their former device.
        history: see `Reader`.

    Raises:
        Refused: the file is not from `torch.save`, or cannot be read safely; see `Reader`.
        Exception: many kinds, if the file is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size == 0:
        raise Refused("it is empty")
    head = file.read(4)
    file.seek(0)
    return (_read_zip if head == b"PK\x03\x04" else _read_old)(file, size, place, history)


def _read_zip(file: BinaryIO, size: int, place: Place, history: MakeHistory) -> Any:
    """An archive; every part that is read is compared with its checksum."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise Refused(f"it is cut short or damaged ({error})") from error
    parts = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in parts if name.split("/")[1:] == ["data.pkl"]]
    folder = pickles[0].split("/")[0] if pickles else ""
    if f"{folder}/constants.pkl" in parts:
        raise Refused("it is a TorchScript archive, which holds code; save the state_dict of its model instead")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in parts.values()):
        raise Refused("it is a zip archive with compressed parts, and torch.save compresses nothing")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise Refused(f"its parts claim to be larger than the file, which has {size} bytes")
    if len(pickles) != 1:
        raise Refused("it is a zip archive, but not one that torch.save wrote")
    if parts[pickles[0]].file_size > PICKLE_BYTES:
        raise Refused(f"its pickle has more than {PICKLE_BYTES // 2**20} MiB, and tensors are not in it")
    order = f"{folder}/byteorder"
    if order in parts and _bytes(archive, parts[order]).decode("latin-1") != sys.byteorder:
        raise Refused(f"it was not written on a {sys.byteorder}-endian machine")
    found: dict[str, torch.UntypedStorage] = {}

    def storage(said: tuple) -> Stored:
        _, kind, key, location, _ = said[:5]
        if key not in found:
            part = parts.get(f"{folder}/data/{key}")
            if part is None:
                raise Refused("it lacks the data of a tensor")
            with archive.open(part) as content:
                found[key] = place(_filled(content, part.file_size, kind), location)
        return Stored(found[key], kind.dtype)

    pickle = io.BytesIO(_bytes(archive, parts[pickles[0]]))
    return Reader(pickle, storage, GROWTH * size + _SPARE, history).load()


def _bytes(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bytes:
    with archive.open(part) as content:
        return content.read()


def _filled(content: BinaryIO, size: int, kind: Kind) -> torch.UntypedStorage:
    """The next bytes of a file as a tensor's storage; Refused if the file has fewer."""
    tensor = torch.empty(size, dtype=torch.uint8)
    view, done = memoryview(tensor.numpy()), 0
    while done < size:
        count = content.readinto(view[done : done + 2**22])
        if not count:
            raise Refused("it is cut short")
        done += count
    if kind.dtype == torch.bool:
        tensor.copy_(tensor != 0)  # PyTorch assumes that booleans are 0 and 1
    return tensor.untyped_storage()


def _read_old(file: BinaryIO, size: int, place: Place, history: MakeHistory) -> Any:
    """The format before PyTorch 1.6: pickles of a number, a version, the machine, the object and the names of storages.

    The bytes of the storages follow, and only the object says which types they have. So the object is read twice, the
    first time for these types.
    """
    budget = GROWTH * size + _SPARE

    def none(said: tuple) -> Stored:
        raise Refused("it is a pickle, but not one that torch.save wrote")

    if Reader(file, none, budget).load() != _MAGIC or Reader(file, none, budget).load() != _PROTOCOL:
        raise Refused("it is a pickle, but not one that torch.save wrote")
    machine = Reader(file, none, budget).load()
    if type(machine) is not dict or machine.get("little_endian") is not (sys.byteorder == "little"):
        raise Refused(f"it was not written on a {sys.byteorder}-endian machine")
    start = file.tell()
    said_of: dict[str, tuple[Kind, str, int]] = {}
    empty: dict[str, torch.UntypedStorage] = {}

    def noted(said: tuple) -> Stored:
        _, kind, key, location, count, *view = said
        count *= kind.dtype.itemsize if kind.dtype else 1
        if any(view) or said_of.setdefault(key, (kind, location, count)) != (kind, location, count):
            raise Refused("it has tensors that share other tensors' data in an outdated form")
        if key not in empty:
            if count + sum(storage.nbytes() for storage in empty.values()) > size:
                raise Refused("it is cut short")
            # NumPy's zeros take no memory until they are written to.
            empty[key] = torch.from_numpy(np.zeros(count, np.uint8)).untyped_storage()
        return Stored(empty[key], kind.dtype)

    Reader(file, noted, budget).load()
    keys = Reader(file, none, budget).load()
    if type(keys) is not list or collections.Counter(keys) != dict.fromkeys(said_of, 1):
        raise Refused("it lacks the data of a tensor")
    found = {}
    for key in keys:
        kind, location, count = said_of[key]
        width = kind.dtype.itemsize if kind.dtype else 1
        if struct.unpack("<q", file.read(8)) != (count // width,):
            raise Refused("the data of a tensor has another size than the file says")
        found[key] = Stored(place(_filled(file, count, kind), location), kind.dtype)
    file.seek(start)
    return Reader(file, lambda said: found[said[2]], budget, history).load()

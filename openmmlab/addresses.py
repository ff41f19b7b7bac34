"""Checkpoints by address: each is fetched once, whole or not at all, and has its own name in the cache."""

import difflib
import hashlib
import http.client
import os
import pathlib
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import mmengine.runner.checkpoint
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.openmmlab.checkpoint import load_bytes, load_file

PATIENCE = 20.0
"""Seconds without an answer after which a server counts as out of reach."""


def _zoos() -> dict[str, Callable[[], dict[str, str]]]:
    """For each scheme, a function that gives the addresses of a zoo's models by their names."""
    checkpoint = mmengine.runner.checkpoint
    openmmlab, torchvision = checkpoint.get_external_models, checkpoint.get_torchvision_models
    return {
        "open-mmlab": openmmlab,
        "openmmlab": openmmlab,
        "mmcls": checkpoint.get_mmcls_models,
        "modelzoo": torchvision,
        "torchvision": torchvision,
    }


def install() -> None:
    """Makes mmengine fetch checkpoints through this module. A second call changes nothing."""
    mmengine.runner.checkpoint.load_from_http = load_from_http
    backends = (r"(\S+\:)?s3://", r"(\S+\:)?petrel://")
    for prefixes, loader in (
        (("http://", "https://"), load_from_http),
        ([f"{scheme}://" for scheme in _zoos()], load_from_zoo),
        (backends, load_from_backend),
    ):
        CheckpointLoader.register_scheme(prefixes=prefixes, loader=loader, force=True)


def load_from_http(
    filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = False
) -> Any:
    """mmengine's loader of web addresses. The first process downloads, then processes that do not see its file.

    Args:
        filename: the address.
        map_location: as in `load_file`.
        model_dir: where files are kept, instead of PyTorch's cache.
        progress: mmengine's; not used: a line of the log always says that a file is fetched.

    Raises:
        InputError: the file cannot be fetched or is refused; the message names the address and the file to put there.
    """
    path = cached(filename, model_dir)
    failure = None
    if is_main_process():
        try:
            _fetch(filename, path)
        except InputError as error:
            failure = error
    barrier()  # the other processes wait for the file, but not forever if it cannot be fetched
    if failure is not None:
        raise failure
    _fetch(filename, path)
    try:
        return load_file(path, map_location)
    except InputError as error:
        raise InputError(f"{error}; it was fetched from {filename}: remove it to fetch it again") from error


def cached(address: str, folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Where the file of an address is kept, in PyTorch's cache unless a folder is named.

    Two addresses may end in the same name, so the file's name includes a digest of the address. A file that `torch.hub`
    left under the plain name is taken if the name ends in the file's digest, as the names of PyTorch and OpenMMLab do.
    """
    folder = pathlib.Path(folder or os.path.join(torch.hub.get_dir(), "checkpoints"))
    name = pathlib.PurePosixPath(urllib.parse.urlparse(address).path).name or "checkpoint.pth"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = folder / f"{digest}-{name}"
    plain, said = folder / name, re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if not path.is_file() and said and plain.is_file() and _digest(plain).startswith(said[1]):
        return plain
    return path


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(address: str, path: pathlib.Path) -> None:
    """Downloads a file if it is missing; InputError if that fails, and no partial file is left."""
    if path.is_file():
        return
    print_log(f"Fetching {address} into {path}", logger="current")
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "terrazzo"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer, written_whole(path) as temporary:
            length, count = answer.headers.get("Content-Length"), 0
            with open(temporary, "wb") as file:
                while block := answer.read(2**20):
                    count += file.write(block)
            if length is not None and count != int(length):
                raise OSError(f"{count} of {length} bytes came")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(
            f"weights {address} could not be fetched ({_cause(error)}); without a network, get the file elsewhere and "
            f"put it at {path}"
        ) from error


def _cause(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return "its server is not known; is there a network?"
    if isinstance(reason, TimeoutError):
        return f"no answer for {PATIENCE:g} seconds"
    return " ".join(str(getattr(reason, "strerror", None) or reason).split())[:200] or type(reason).__name__


def load_from_zoo(filename: str, map_location: Any = None) -> Any:
    """mmengine's loader of names in a zoo, such as `torchvision://resnet50` and `open-mmlab://resnext50_32x4d`.

    Raises:
        InputError: the zoo lacks the model (the message lists close names), or as for `load_from_http`.
    """
    scheme, name = filename.split("://", 1)
    addresses = _zoos()[scheme]()
    name = mmengine.runner.checkpoint.get_deprecated_model_names().get(name, name)
    if name not in addresses:
        close = difflib.get_close_matches(name, addresses, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(sorted(addresses)[:5])}, ..."
        raise InputError(f"weights '{filename}' are not among the {len(addresses)} of {scheme}://; {hint}")
    address = addresses[name]
    if address.startswith(("http://", "https://")):
        checkpoint = load_from_http(address, map_location)
    else:  # a user's list may name files beside the list
        checkpoint = load_file(pathlib.Path(mmengine.runner.checkpoint._get_mmengine_home(), address), map_location)
    return mmengine.runner.checkpoint._process_mmcls_checkpoint(checkpoint) if scheme == "mmcls" else checkpoint


def load_from_backend(filename: str, map_location: Any = None, backend: str = "petrel") -> Any:
    """mmengine's loader of files in an object store.

    Raises:
        InputError: the store cannot be reached, or the file is refused.
    """
    try:
        content = get_file_backend(filename, backend_args={"backend": backend}).get(filename)
    except Exception as error:  # a store's client fails in many ways, and may not be installed
        raise InputError(
            f"checkpoint '{filename}' could not be fetched by the backend {backend}: {_cause(error)}"
        ) from error
    return load_bytes(content, filename, map_location)

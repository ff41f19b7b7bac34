"""Tries to build one OpenMMLab config after another; this runs in the process that may crash."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import logging
import os
import re
import socket
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from packaging.requirements import InvalidRequirement, Requirement

import terrazzo.openmmlab  # noqa: F401  makes mmengine ready before anything of it is used
from terrazzo.openmmlab._mmengine import is_installed
from terrazzo.tools.doctor.unfilled import Unfilled
from terrazzo.tools.reports.zoo import BUILT, FAILED, LACKS, NEEDS, NO_MODEL, Finding

ABSENT = (
    r"mim install (\w+)",
    r"pip install (?:-\w+ )*[\"']?git\+[^\s\"'`]*?/([\w-]+)(?:\.git)?(?:[@#\s\"'`,]|$)",
    r"pip install (?:-\w+ )*[\"']?([a-z](?:[\w./<>=!~-]|,(?=[<>=!~]))*)",
    r"install (\w+) (?:first|manually)",
    r"`get_started.md` to install (\w+)",
    r"'(\w+)\.\w+ is not in the",
)
"""How OpenMMLab's packages say that another package is absent, the most exact first; few raise ModuleNotFoundError."""

WEIGHTS = "its weights"
"""What a model needs that downloads weights while it is built, or that changes weights which it was to load."""

WITHOUT_WEIGHTS = ("NetworkClosed", "NotLoaded", "LocalEntryNotFoundError", "OfflineModeIsEnabled")


class NetworkClosed(OSError):
    """An attempt to reach the network while a config was built."""


class NotLoaded(KeyError):
    """A look at weights that the doctor does not load."""


class NoWeights(dict):
    """A checkpoint that is not loaded: empty, and with an error of its own for code that looks for a weight."""

    def __missing__(self, key):
        raise NotLoaded(key)


def prepare() -> None:
    """Prepares a fresh process: silent, without network, and with the process group that some layers need."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(RuntimeError, ValueError):  # without gloo, these layers will say so
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    socket.getaddrinfo = _closed


def identify(path: Path) -> str:
    """A digest of the model of a config: equal for configs that differ in data or schedule only.

    Returns:
        Nothing for a config that has no model or cannot be read.
    """
    try:
        cfg = _read(path)
    except (Exception, SystemExit):
        return ""
    if not cfg.get("model"):
        return ""
    identity = (cfg.get("default_scope"), cfg.get("custom_imports"), cfg.model)
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def examine(path: Path) -> Finding:
    """Builds the model of a config, without filling its weights and without loading any."""
    # mmcv's Python side has the operators; it is imported here and not with every use of this module.
    from terrazzo.tools.doctor.operators import is_missing, operators_of

    try:
        cfg = _read(path)
        if not cfg.get("model"):
            return Finding(NO_MODEL)
        scope = cfg.get("default_scope") or _package_of(path)
        with _quiet(), _no_checkpoints(), DefaultScope.overwrite_default_scope(scope):
            model = _built(cfg)
            lacking = sorted(filter(is_missing, operators_of(model, cfg.model)))
    except (Exception, SystemExit) as error:  # a config is code, and so is what it builds
        finding = explain(error)
        scope = _absent_scope(path) if finding.status == FAILED else None
        return Finding(NEEDS, scope) if scope else finding
    return Finding(LACKS, ", ".join(lacking)) if lacking else Finding(BUILT)


def _built(cfg: Config) -> torch.nn.Module:
    """The model of a config."""
    try:
        with Unfilled():
            return MODELS.build(ConfigDict(cfg.model.copy()))  # building changes the settings
    except torch.linalg.LinAlgError:  # the model inverts a matrix, and arbitrary numbers may have no inverse
        return MODELS.build(ConfigDict(cfg.model.copy()))


def explain(error: BaseException) -> Finding:
    """What an error says: that a package is absent, or something else in one line."""
    for link in _chain(error):
        if type(link).__name__ in WITHOUT_WEIGHTS or "is not in the pretrained model" in str(link):
            return Finding(NEEDS, WEIGHTS)
        if isinstance(link, ModuleNotFoundError) and link.name:
            return Finding(NEEDS, link.name.split(".")[0])
        text = " ".join(str(link).split())
        for pattern in ABSENT:
            match = re.search(pattern, text, re.IGNORECASE)
            name = match and match[1].rstrip(".").lower()
            if name and _is_absent(name):
                return Finding(NEEDS, name)
    lines = str(error).strip().splitlines()
    return Finding(FAILED, f"{type(error).__name__}: {' '.join(lines[0].split()) if lines else 'no message'}")


def _package_of(path: Path) -> str | None:
    """The package that ships a config: some of mmpretrain's configs leave it to mmpretrain to name the scope."""
    return next((folder.parent.name for folder in path.parents if folder.name == ".mim"), None)


def _absent_scope(path: Path) -> str | None:
    """The package that the model of a config comes from (`_scope_`), if it is not installed."""
    try:
        scope = _read(path).model.get("_scope_")
    except (Exception, SystemExit):  # the config itself cannot be read
        return None
    return scope if scope and not is_installed(scope) else None


def _is_absent(requirement: str) -> bool:
    """Whether a list of packages (a path), or a package, perhaps with its version, is not installed."""
    if "/" in requirement:
        return True
    name = re.split("[<>=!~]", requirement)[0]
    if not is_installed(name):
        return True
    try:
        wanted = Requirement(requirement).specifier
        return not wanted.contains(importlib.metadata.version(name), prereleases=True)
    except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
        return False


@functools.lru_cache(maxsize=1)  # a config is identified and then examined
def _read(path: Path) -> Config:
    # Configs name their teachers' configs relative to the root of their package.
    os.chdir(next((folder.parent for folder in path.parents if folder.name == "configs"), path.parent))
    with _quiet():
        return Config.fromfile(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _no_checkpoints() -> contextlib.AbstractContextManager:
    """Inside this context, models that load a teacher's or a tracker's weights while they are built load nothing."""
    checkpoint = NoWeights(state_dict=NoWeights())
    return unittest.mock.patch.object(CheckpointLoader, "load_checkpoint", return_value=checkpoint)


def _closed(*args, **kwargs) -> NoReturn:
    raise NetworkClosed("building a model must not need the network, and here it has none")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

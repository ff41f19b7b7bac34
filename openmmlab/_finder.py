"""Modules that mmdet and mmseg import and an installation may lack: found here if they are found nowhere else."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class StandInLoader(importlib.abc.Loader):
    """Fills a module with the given names."""

    def __init__(self, names: Mapping[str, Any]):
        self.names = names

    def exec_module(self, module: ModuleType) -> None:
        """Puts the names in the module."""
        module.__dict__.update(self.names)


class StandInFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a table and nothing else. It comes last, so that installed modules are found first.

    Args:
        modules: the names that each module holds, by the full name of the module.
    """

    def __init__(self, modules: Mapping[str, Mapping[str, Any]]):
        self.modules = modules

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the table."""
        if fullname not in self.modules:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self.modules)
        loader = StandInLoader(self.modules[fullname])
        return importlib.machinery.ModuleSpec(fullname, loader, origin="terrazzo.openmmlab", is_package=is_package)


def install(modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Appends a finder of the modules to `sys.meta_path`, once."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder(modules))

"""Registers the models with timm: at once if timm is imported, otherwise at the end of timm's import.

`import terrazzo` does not import timm itself, because timm brings PyTorch along, and `terrazzo --help` needs neither.
A model cannot be created before timm is imported, so nobody can tell the difference.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_MODELS = ("terrazzo.backbones", "terrazzo.restoration")


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as the other finders do, and lets its loader import the models after timm."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of timm; None for any other module."""
        if fullname != "timm":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if module.__name__ == "timm":  # a loader of an archive loads other modules, too
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _import_models()

        spec.loader.exec_module = load_and_register
        return spec


def _import_models() -> None:
    for package in _MODELS:
        importlib.import_module(package)


def register() -> None:
    """Register every model with timm now, or when timm is imported."""
    if "timm" in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())

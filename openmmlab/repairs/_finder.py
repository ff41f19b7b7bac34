"""Imports a module with repairs: a changed source, or a stand-in for a module that the installation lacks."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType, ModuleType


@dataclass(frozen=True)
class Repair:
    """What a package needs.

    Attributes:
        edits: for modules of the package, texts and what replaces each; a module without these texts stays untouched.
        stand_ins: for modules that the package imports and an installation may lack, the module whose names to use;
            an empty string is a package without names of its own.
        replaced: the same for modules that are replaced where they are installed, too.
    """

    edits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)


class EditedLoader(importlib.machinery.SourceFileLoader):
    """Loads a source file with some texts replaced; it neither reads nor writes byte code, which holds the original."""

    def __init__(self, name: str, path: str, edits: Mapping[str, str]):
        super().__init__(name, path)
        self.edits = edits

    def get_code(self, fullname: str) -> CodeType:
        """The compiled module."""
        source = importlib.util.decode_source(self.get_data(self.path))
        return self.source_to_code(edited(source, self.edits).encode(), self.path)


class AliasLoader(importlib.abc.Loader):
    """Gives a module the names of another module."""

    def __init__(self, target: str):
        self.target = target

    def exec_module(self, module: ModuleType) -> None:
        """Copies the names."""
        if self.target:
            names = vars(importlib.import_module(self.target)).items()
            module.__dict__.update({name: value for name, value in names if not name.startswith("__")})


class RepairFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that a table of repairs names. It comes first and asks the other finders for the original.

    Args:
        repairs: what each package needs, by its name. A stand-in exists only from the import of its package on, so
            that code which tries to import that module for a reason of its own finds what it found before.
    """

    def __init__(self, repairs: Mapping[str, Repair]):
        self.repairs = repairs

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module with repairs; None leaves the module to the other finders."""
        for package, repair in self.repairs.items():
            if package == fullname.partition(".")[0] or package in sys.modules:
                if fullname in repair.edits:
                    return self._edited(fullname, path, target, repair.edits[fullname])
                if fullname in repair.replaced:
                    return _alias(fullname, repair.replaced)
                if fullname in repair.stand_ins and self._original(fullname, path, target) is None:
                    return _alias(fullname, repair.stand_ins)
        return None

    def _edited(self, fullname, path, target, edits) -> importlib.machinery.ModuleSpec | None:
        spec = self._original(fullname, path, target)
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            return None
        source = importlib.util.decode_source(spec.loader.get_data(spec.loader.path))
        if edited(source, edits) == source:
            return None
        spec.loader = EditedLoader(fullname, spec.loader.path, edits)
        spec.cached = None
        return spec

    def _original(self, fullname, path, target) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                return spec
        return None


def edited(source: str, edits: Mapping[str, str]) -> str:
    """A source with its texts replaced."""
    for old, new in edits.items():
        source = source.replace(old, new)
    return source


def _alias(fullname: str, modules: Mapping[str, str]) -> importlib.machinery.ModuleSpec:
    is_package = any(name.startswith(f"{fullname}.") for name in modules)
    loader = AliasLoader(modules[fullname])
    return importlib.machinery.ModuleSpec(fullname, loader, origin="terrazzo.openmmlab", is_package=is_package)


def install(repairs: Mapping[str, Repair]) -> None:
    """Puts a finder of the repairs before all other finders, once."""
    if not any(isinstance(finder, RepairFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RepairFinder(repairs))

"""The import of `mmcv._ext`, mmcv's compiled operators, where no compiled mmcv is installed."""

import functools
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

from terrazzo.errors import BackendError
from terrazzo.openmmlab.ops import OPERATORS

NAME = "mmcv._ext"


class MissingOperator:
    """Stands for an operator that terrazzo does not provide: `mmcv.ops` can be imported, and a call says what to do."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        raise BackendError(
            f"mmcv operator '{self.__name__}' is not provided by terrazzo.openmmlab, which stands in for mmcv's "
            "compiled operators (`terrazzo doctor openmmlab` lists those it provides); install an mmcv compiled for "
            "this PyTorch, or choose a config without this operator"
        )

    def __repr__(self) -> str:
        return f"<missing mmcv operator '{self.__name__}'>"


@functools.cache
def _missing(name: str) -> MissingOperator:
    """The stand-in for an operator by name. Underscored names are Python's own probing, not operators.

    Raises:
        AttributeError: for an underscored name.
    """
    if name.startswith("_"):
        raise AttributeError(f"module '{NAME}' has no attribute '{name}'")
    return MissingOperator(name)


class ExtLoader(importlib.abc.Loader):
    """Fills the module with terrazzo's operators."""

    def exec_module(self, module: ModuleType) -> None:
        """Puts the table of operators and, for every other name, its refusal in the module."""
        module.__dict__.update(OPERATORS)
        module.__getattr__ = _missing


class ExtFinder(importlib.abc.MetaPathFinder):
    """Finds `mmcv._ext` and nothing else. It stands last, so that a compiled module is found before it."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """The spec of `mmcv._ext`."""
        if fullname != NAME:
            return None
        return importlib.machinery.ModuleSpec(NAME, ExtLoader(), origin="terrazzo.openmmlab.ops")


def install() -> None:
    """Appends the finder to `sys.meta_path`, once."""
    if not any(isinstance(finder, ExtFinder) for finder in sys.meta_path):
        sys.meta_path.append(ExtFinder())

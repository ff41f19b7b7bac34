"""Importing a framework at first use, with one clear error where it is not installed."""

import importlib
import importlib.util
from types import ModuleType

from terrazzo.errors import BackendError


def framework(name: str, install: str) -> ModuleType:
    """Import a module of a framework.

    Args:
        name: The module, for example "ultralytics.nn.tasks".
        install: What a user installs to have it, as pip's argument.

    Raises:
        BackendError: The framework is not installed.
    """
    top = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != top:
            raise  # the framework is there, and a package that it needs is not
        raise BackendError(f"this needs {top}, which is not installed: pip install {install}") from error

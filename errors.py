"""The exceptions that terrazzo raises on purpose, and its warning. Catch `TerrazzoError` for all exceptions."""

import importlib.metadata
import json
from pathlib import Path


class TerrazzoError(Exception):
    """Base of every error that terrazzo raises on purpose; the command line prints it as one line and exits with 2."""


class InputError(TerrazzoError, ValueError):
    """An argument, a file or a shape that cannot be used; the message names the value, the limit and the next step."""


class WeightsError(InputError, RuntimeError):
    """Weights that do not fit a model; a RuntimeError as in PyTorch. The message names the nearest model."""


class BackendError(TerrazzoError, RuntimeError):
    """A backend that was asked for by name and cannot run here; the message says why."""


class NonFiniteError(TerrazzoError, ArithmeticError):
    """A loss that is NaN or infinite; the message says at which iteration, and which layer produced it."""


class SavingError(TerrazzoError, OSError):
    """A checkpoint that could not be written; the message says why, and that earlier checkpoints are whole."""


class PictureWarning(UserWarning):
    """Says how pictures were converted if their type does not fix the range."""


def own_text(error: TerrazzoError) -> str:
    """What an error says, without the traceback that PyTorch adds to errors from data loaders' workers."""
    text, kind = str(error), type(error)
    if text.startswith(f"Caught {kind.__name__} in "):
        return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].rstrip()
    return text


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra: from the checkout or the wheel that terrazzo came from.

    terrazzo is not on a package index yet. If it was installed from an index, its name alone is enough.
    """
    root = Path(__file__).resolve().parent
    if (root / "pyproject.toml").is_file():
        return f"pip install -e '{root}[{extra}]'"
    place = ""
    try:
        record = importlib.metadata.distribution("terrazzo").read_text("direct_url.json")
        place = json.loads(record)["url"] if record else ""
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        pass  # unpacked by hand, or the record is damaged
    return f"pip install 'terrazzo[{extra}]{f' @ {place}' if place else ''}'"

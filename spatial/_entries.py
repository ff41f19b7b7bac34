"""The table of modules: how each kind of module works on its rank's rows.

The entries of a Python module `package.folder.more.name` are in `spatial/entries/package_name.py`, or else in
`spatial/entries/package_folder.py`. So a new family adds a file, and nothing else changes. A class of a user may have a
method `spatial_forward(self, part, ...)` instead.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn


class Entry(NamedTuple):
    """How a kind of module works on its rank's rows.

    Attributes:
        run: `run(part, module, ...)` replaces the module's method. None if the module's own code works on single
            positions, and calls other modules for everything else.
        method: The name of the method.
        kept: Names of child modules that stay as they are, because `run` gives them all positions that they need; "*"
            for all.
        check: Says why a module of this kind cannot work; None if it can.
        also: Entries of further methods of the module.
    """

    run: Callable[..., Any] | None = None
    method: str = "forward"
    kept: tuple[str, ...] = ()
    check: Callable[[nn.Module], str | None] | None = None
    also: "tuple[Entry, ...]" = ()


OWN = Entry()
"""The module's own code works on single positions."""


def find(kind: type, more: Mapping[type, Entry]) -> Entry | None:
    """The entry of a class, or of a base class whose code it has; None if there is none."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            return None
        entry = more.get(base) or _of(base)
        if entry is not None:
            methods = {"forward", entry.method, *(other.method for other in entry.also)}
            same = all(getattr(kind, name, None) is getattr(base, name, None) for name in methods)
            return entry if same else None
    return None


def _of(kind: type) -> Entry | None:
    if "spatial_forward" in vars(kind):
        return Entry(_by_method)
    package, *folders = kind.__module__.split(".")
    for folder in folders[-1:] + folders[:1]:
        name = f"{package}_{folder.strip('_')}"
        entry = _table(name).get(kind.__qualname__)
        if entry is not None:
            return entry
    return None


def _by_method(part: Any, module: Any, *arguments: Any, **options: Any) -> Any:
    return module.spatial_forward(part, *arguments, **options)


@functools.cache
def _table(name: str) -> Mapping[str, Entry]:
    """The entries of a file, by the names of the classes; empty if there is no file."""
    place = f"terrazzo.spatial.entries.{name}"
    if not name.isidentifier() or importlib.util.find_spec(place) is None:
        return {}
    return importlib.import_module(place).ENTRIES

"""Reducers: published mechanisms that merge or drop a ViT's tokens, the methods of `terrazzo.reduce`.

A reducer is a `Reducer` class, the only one in its file. The file is in this folder, with a name that does not begin
with `_`, or is a family's file (`mctf`, `asvit`). The name of the file is the name of the method, and a new reducer
needs no entry elsewhere.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any

from terrazzo import backbones
from terrazzo.backbones._tokens import Reducer
from terrazzo.errors import InputError


def _of(module: str) -> list[type[Reducer]]:
    """The reducers of a file."""
    own = (item for item in vars(importlib.import_module(module)).values() if isinstance(item, type))
    return [item for item in own if item.__module__ == module and issubclass(item, Reducer)]


def _found() -> dict[str, type[Reducer]]:
    here = (found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
    places = {name: f"{__name__}.{name}" for name in here}
    places |= {name: f"{backbones.__name__}.{name}" for name in backbones.FAMILIES}
    found = {}
    for name, place in sorted(places.items()):
        if kinds := _of(place):
            (found[name],) = kinds
    return found


def reducers() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(_found())


def reducer_class(method: str) -> type[Reducer]:
    """The class of a method.

    Raises:
        InputError: No method has this name.
    """
    found = _found()
    if not isinstance(method, str) or method not in found:
        raise InputError(f"method must be one of {', '.join(found)}, got {method!r}")
    return found[method]


def create_reducer(method: str, depth: int, blocks: Sequence[int] | None, options: dict[str, Any]) -> Reducer:
    """Make a reducer for a ViT.

    Args:
        depth: The number of the ViT's blocks.
        blocks: The blocks that reduce; None for the method's default.
        options: See the method's class.

    Raises:
        InputError: No method has this name, it has no option of a given name, or a value is not valid.
    """
    kind = reducer_class(method)
    known = [name for name in inspect.signature(kind).parameters if name not in ("blocks", "device", "dtype")]
    if not options.keys() <= set(known):
        raise InputError(f"options of {method!r} are {', '.join(known)}, got {', '.join(options)}")
    reducer = kind(blocks=kind.default_blocks(depth) if blocks is None else blocks, **options)
    if not all(0 <= block < depth for block in reducer.blocks):
        raise InputError(f"blocks must be some of 0 to {depth - 1}, got {reducer.blocks}")
    return reducer

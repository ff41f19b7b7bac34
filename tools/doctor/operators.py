"""Which of mmcv's compiled operators a built model would call, and which operators exist.

Building a model calls no operator, and running all of a zoo takes days. So the code is read instead: the functions of a
model's modules, and what these functions refer to, down to the places where `mmcv.ops` calls its compiled module.
"""

import dis
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

import mmcv.ops
from torch import nn

from terrazzo.openmmlab._ext import NAME, MissingOperator
from terrazzo.tools.reports.zoo import DISTRIBUTIONS

READ = ("mmcv", *DISTRIBUTIONS)
"""The packages to read code from."""


def all_operators() -> dict[str, bool]:
    """Every operator that `mmcv.ops` would call, in order, and whether it is provided."""
    found = set()
    for info in pkgutil.iter_modules(mmcv.ops.__path__):
        module = importlib.import_module(f"{mmcv.ops.__name__}.{info.name}")
        found |= _reached([value for value in vars(module).values() if _is_code(value)])
    return {name: not is_missing(name) for name in sorted(found)}


def operators_of(model: nn.Module, settings: Mapping) -> set[str]:
    """The operators that a model refers to.

    The result may include an operator that the model never reaches with its settings; it includes every operator that
    code calls by name.

    Args:
        model: a built model.
        settings: the config that it was built from; functions of `mmcv.ops` that it names (such as `soft_nms`) count.
    """
    roots = set()
    for module in model.modules():
        if getattr(module, "voxel", True) is False:  # mmdet3d's preprocessor, which voxelizes only if it is told to
            continue
        # Besides modules, a model consists of samplers, assigners and coders: plain objects, alone or in lists.
        parts = [item for value in vars(module).values() for item in (value if isinstance(value, list) else [value])]
        roots |= {kind for kind in map(type, (module, *parts)) if _is_read(kind)}
    roots |= {getattr(mmcv.ops, name) for name in _types(settings) if hasattr(mmcv.ops, name)}
    return set().union(*map(_operators_of, roots))


def is_missing(name: str) -> bool:
    """Whether calling this operator would be refused."""
    return isinstance(getattr(importlib.import_module(NAME), name), MissingOperator)


@functools.cache
def _operators_of(root: Any) -> frozenset[str]:
    return frozenset(_reached([root]))


def _reached(roots: Iterable) -> set[str]:
    """The operators that functions and classes reach through what they refer to."""
    operators, seen, waiting = set(), set(), list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        for function in _functions(item):
            operators |= _called(function.__code__, function.__globals__)
            waiting += _referred(function.__code__, function.__globals__)
    return operators


def _functions(item: Any) -> Iterator[FunctionType]:
    """The functions that a class or a function consists of."""
    if inspect.isclass(item):
        members = [member for base in item.__mro__ if _is_read(base) for member in vars(base).values()]
    else:
        members = [item]
    for member in members:
        if isinstance(member, property):
            member = member.fget
        member = inspect.unwrap(getattr(member, "__func__", member))
        if isinstance(member, FunctionType):
            yield member


@functools.cache
def _instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """The instructions of a function and of the functions defined inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return (*dis.get_instructions(code), *(step for part in inner for step in _instructions(part)))


def _called(code: CodeType, names: dict) -> set[str]:
    """The X of every `ext_module.X`, whatever the module is called there."""
    return {
        after.argval
        for step, after in pairwise(_instructions(code))
        if step.opname == "LOAD_GLOBAL" and getattr(names.get(step.argval), "__name__", None) == NAME
    }


def _referred(code: CodeType, names: dict) -> Iterator[Any]:
    """The functions and classes of the packages in `READ` that a function's globals hold.

    Modules are left out: a model's own modules are found in the model, and code only compares with the others.
    """
    steps = _instructions(code)
    for index, step in enumerate(steps):
        if step.opname != "LOAD_GLOBAL" or step.argval not in names:
            continue
        value = names[step.argval]
        for after in steps[index + 1 :]:  # a function by its module, as in `ops.roi_align(...)`
            if not isinstance(value, ModuleType) or value.__name__ == NAME:
                break
            value = getattr(value, str(after.argval), None)
        # `operation = Operation.apply` is how autograd functions are given a name.
        value = value.__self__ if inspect.isclass(getattr(value, "__self__", None)) else value
        if _is_code(value) and _is_read(value) and not _is_module(value):
            yield value


def _is_code(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def _is_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _is_read(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").split(".")[0] in READ


def _types(settings: Any) -> Iterator[str]:
    """Every `type` in nested settings that is given by name."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("type"), str):
            yield settings["type"].split(".")[-1]
        settings = settings.values()
    elif not isinstance(settings, (list, tuple)):
        return
    for item in settings:
        yield from _types(item)

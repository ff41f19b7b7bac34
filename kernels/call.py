"""What a call of an operator is: its sizes, its parameters, and which backends cannot run it.

The op `terrazzo::y` is described by the function `describe` of the package `terrazzo.kernels.y`, which takes a device
and then what the op takes, so a new operator is found by its name alone.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        shape: Size of each axis by name, in the operator's own layout.
        parameters: What else decides the work, as text by name.
        refusals: Why a backend cannot run the call, as `terrazzo.kernels.backend.consider` takes it.
        discouraged: Why "auto" passes over a backend that could.
    """

    shape: Mapping[str, int]
    parameters: Mapping[str, str]
    refusals: Mapping[str, str]
    discouraged: Mapping[str, str]


def operator_name(function: torch._ops.OpOverload) -> str | None:
    """The operator of terrazzo that `function` is; None for any other operation, a gradient's included."""
    if function.namespace != "terrazzo" or _package(function) is None:
        return None
    return function._opname


def describe(
    function: torch._ops.OpOverload, device: torch.device, args: Sequence[object], kwargs: Mapping[str, object]
) -> Call:
    """Describe a call as it would be on `device`.

    Args:
        function: An operator of terrazzo: `operator_name` names it.
        device: Where the call would run; that of its tensors does not count, so they may be on the meta device.
        args, kwargs: What the op takes.
    """
    return _package(function).describe(device, *args, **kwargs)


def _package(function: torch._ops.OpOverload):
    name = f"terrazzo.kernels.{function._opname}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None

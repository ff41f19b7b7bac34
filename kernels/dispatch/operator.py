"""One operator as all callers see it: which of its forms runs and why, the description of a call, its PyTorch ops.

The op `terrazzo::y` belongs to the object `OPERATOR` of `terrazzo.kernels.y.op`: a new operator is found by its name.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels.dispatch import backend as backends
from terrazzo.kernels.dispatch import fused, opaque
from terrazzo.kernels.dispatch.exporting import is_exporting

EXPORTED = "exported"


class Needs(NamedTuple):
    """The facts of a call that decide which forms can compute it.

    Attributes:
        device: where the tensors are.
        dtype: the dtype in which the kernels would compute.
        misfit: why the kernels cannot take the call's sizes; None if they can.
        slow: why "auto" does not choose the kernels for CPUs, which run at all sizes; None if it does.
    """

    device: torch.device
    dtype: torch.dtype
    misfit: str | None = None
    slow: str | None = None


class Call(NamedTuple):
    """What `terrazzo explain` prints about a call.

    Attributes:
        shape: size of each axis by name, in the operator's own layout.
        parameters: other parameters that decide the amount of work, as text by name.
    """

    shape: Mapping[str, int]
    parameters: Mapping[str, str] = {}


@dataclass(frozen=True)
class Operator:
    """An operator: its choice of a form, and the registration of its ops.

    Attributes:
        name: the package under `terrazzo.kernels`, and the op under `torch.ops.terrazzo`.
        opaque: the backends that run as an opaque op, which has one gradient only (see `opaque`).
        needs: maps the arguments of the op to `Needs`; trailing arguments may be missing.
        describe: maps the arguments of the op to a `Call`.
        cpu: whether the operator has kernels for CPUs, which take all sizes.
    """

    name: str
    opaque: tuple[str, ...]
    needs: Callable[..., Needs]
    describe: Callable[..., Call]
    cpu: bool = False

    def choose(self, requested: str, *arguments) -> str:
        """The form of a call: "fused", "portable" or "reference", or "exported" while an exporter traces.

        Args:
            requested: the call's own `backend` argument.
            arguments: the arguments of `needs`.

        Raises:
            BackendError: a backend was requested by name and cannot run the call.
            InputError: the requested name is not a backend.
        """
        if is_exporting():
            backends.check_name(requested)
            return EXPORTED
        return _choose(self.name, self.opaque, requested, *self.needs(*arguments), self.cpu)

    def why(self, requested: str, *arguments, device: torch.device | None = None, **more) -> backends.Choice:
        """Which backend would run a call outside of exporters, and why the others would not.

        Args:
            requested, arguments, more: as in `choose`. A backend that cannot run is not an error here.
            device: where the call would run. None: where its tensors are, which may be the meta device.

        Raises:
            InputError: the requested name is not a backend.
        """
        needs = self.needs(*arguments, **more)
        return backends.consider(requested, *fused.refusals(device or needs.device, *needs[1:], self.cpu))

    def op(self, part: str = "", *, fake: Callable, flops: Callable | None = None) -> Callable:
        """Register a function, by its annotations, as the opaque op `terrazzo::<name>`; see `opaque.op`.

        Args:
            part: the suffix of the op's name, for example "backward"; empty for the main op.
            fake: returns tensors with the shapes, dtypes and strides of the function's, from the same arguments.
            flops: counts FLOPs from the same arguments, with shapes instead of tensors (`torch.utils.flop_counter`).
        """
        name = f"{self.name}_{part}" if part else self.name

        def define(function: Callable) -> Callable:
            defined = opaque.op(f"terrazzo::{name}", fake)(function)
            if flops is not None:
                register_flop_formula(getattr(torch.ops.terrazzo, name))(flops)
            return defined

        return define


def _choose(
    name: str,
    opaque_forms: tuple[str, ...],
    requested: str,
    *needs,
) -> str:
    return backends.choose(name, requested, *fused.refusals(*needs), opaque=opaque_forms).name


# Dynamo cannot trace what a choice reads (context, environment, device), so it takes the name as a constant while
# tracing. torch.compiler.assume_constant_result sets this flag; calling it would import torch._dynamo and triton.
_choose._dynamo_marked_constant = True


def find(function: torch._ops.OpOverload) -> Operator | None:
    """The operator that has `function` as its main op; None for any other operation, gradients included."""
    if function.namespace != "terrazzo":
        return None
    package = f"terrazzo.kernels.{function._opname}"
    try:
        return importlib.import_module(f"{package}.op").OPERATOR
    except ModuleNotFoundError as error:
        if error.name not in (package, f"{package}.op"):
            raise
        return None

"""One operator as all callers see it: which of its forms runs and why, what a call is, and its ops in PyTorch.

The op `terrazzo::y` belongs to the object `OPERATOR` of `terrazzo.kernels.y.op`: a new operator is found by its name.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels.dispatch import backend as backends
from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.triton_host import machine

EXPORTED = "exported"


class Needs(NamedTuple):
    """What decides which forms can compute a call.

    Attributes:
        device: where its tensors are.
        dtype: the dtype that the kernels would compute in.
        misfit: why the kernels cannot hold its sizes; None where they can.
    """

    device: torch.device
    dtype: torch.dtype
    misfit: str | None = None


class Call(NamedTuple):
    """What `terrazzo explain` says of a call.

    Attributes:
        shape: size of each axis by name, in the operator's own layout.
        parameters: what else decides the work, as text by name.
    """

    shape: Mapping[str, int]
    parameters: Mapping[str, str] = {}


@dataclass(frozen=True)
class Operator:
    """An operator: its choice of a form, and the registration of its ops.

    Attributes:
        name: the package under `terrazzo.kernels`, and the op under `torch.ops.terrazzo`.
        opaque: the backends that run as an opaque op, which has one gradient only (see `opaque`).
        needs: the arguments of the op to `Needs`; called with all of them, or without the last ones.
        describe: the arguments of the op to a `Call`.
    """

    name: str
    opaque: tuple[str, ...]
    needs: Callable[..., Needs]
    describe: Callable[..., Call]

    def choose(self, requested: str, *arguments) -> str:
        """The form of a call: "fused", "portable" or "reference", or "exported" while an exporter traces.

        Args:
            requested: the call's own `backend` argument.
            arguments: what `needs` takes.

        Raises:
            BackendError: a backend was asked for by name and cannot run the call.
            InputError: the name asked for is no backend.
        """
        if is_exporting():
            backends.check_name(requested)
            return EXPORTED
        device, dtype, misfit = self.needs(*arguments)
        return _choose(self.name, self.opaque, requested, device, dtype, misfit)

    def why(self, requested: str, *arguments, device: torch.device | None = None, **more) -> backends.Choice:
        """Which backend a call would run with outside of exporters, and why not with others.

        Args:
            requested, arguments, more: as `choose` takes them. A backend that cannot run is no error here.
            device: where the call would run; None where its tensors are, which may be the meta device.

        Raises:
            InputError: the name asked for is no backend.
        """
        needs = self.needs(*arguments, **more)
        return backends.consider(requested, *machine.refusals(device or needs.device, needs.dtype, needs.misfit))

    def op(self, part: str = "", *, fake: Callable, flops: Callable | None = None) -> Callable:
        """Register a function, by its annotations, as the opaque op `terrazzo::<name>`; see `opaque.op`.

        Args:
            part: what follows the operator's name, as "backward"; the main op has none.
            fake: shapes, dtypes and strides of what the function returns, from the same arguments.
            flops: the count from the same arguments, with shapes in the place of tensors (`torch.utils.flop_counter`).
        """
        name = f"{self.name}_{part}" if part else self.name

        def define(function: Callable) -> torch.library.CustomOpDef:
            defined = opaque.op(f"terrazzo::{name}", fake)(function)
            if flops is not None:
                register_flop_formula(getattr(torch.ops.terrazzo, name))(flops)
            return defined

        return define


def _choose(
    name: str,
    opaque_forms: tuple[str, ...],
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    misfit: str | None,
) -> str:
    return backends.choose(name, requested, *machine.refusals(device, dtype, misfit), opaque=opaque_forms).name


# Dynamo cannot trace what a choice reads (context, environment, device): it takes the name at its value when tracing.
# This is what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton.
_choose._dynamo_marked_constant = True


def find(function: torch._ops.OpOverload) -> Operator | None:
    """The operator whose main op `function` is; None for any other operation, a gradient's included."""
    if function.namespace != "terrazzo":
        return None
    package = f"terrazzo.kernels.{function._opname}"
    try:
        return importlib.import_module(f"{package}.op").OPERATOR
    except ModuleNotFoundError as error:
        if error.name not in (package, f"{package}.op"):
            raise
        return None

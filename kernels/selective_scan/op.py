"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import backend as _backend
from terrazzo.kernels import opaque, triton_host
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting
from terrazzo.kernels.selective_scan import exported, fused, portable, reference
from terrazzo.kernels.selective_scan.orders import ORDERS
from terrazzo.kernels.selective_scan.scans import Scans, accumulator


def _refusals(device: torch.device, dtype: torch.dtype, states_fit: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, fused.STATES.misfit(states_fit))


def _decisive(u: torch.Tensor, *others: torch.Tensor) -> torch.dtype:
    """The dtype that decides who can compute a call: that of u, float64 where any tensor is of float64."""
    return torch.float64 if accumulator(u, *others) == torch.float64 else u.dtype


def choose(backend: str, device: torch.device, dtype: torch.dtype, states_fit: bool = True) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose(
        "selective_scan", backend, *_refusals(device, dtype, states_fit), opaque=("fused", "portable")
    )


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, states_fit: bool) -> str:
    return choose(backend, device, dtype, states_fit).name


# Dynamo cannot trace what a choice reads (context, environment, device): it takes the name at its value when tracing.
# This is what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton.
_chosen._dynamo_marked_constant = True


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge, backend):
    batch, length, scans, channels = delta.shape
    chunk = (fused if backend == "fused" else portable).CHUNK
    dtype = accumulator(u, delta, A, B, C)
    states = A.new_empty(batch, (length + chunk - 1) // chunk, scans, A.shape[2], channels, dtype=dtype)
    if merge:
        return u.new_empty(batch, length, channels, dtype=dtype), states
    return u.new_empty(delta.shape), states


@opaque.op("terrazzo::selective_scan", _fake)
def _forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    orders: Sequence[int],
    width: int,
    merge: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the state in front of every chunk of steps, (B, chunks, K, N, D). `scan` has chosen `backend`."""
    form = fused if backend == "fused" else portable
    return form.forward(Scans(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge))


def _fake_gradients(grad, states, u, delta, A, B, C, D, z, delta_bias, *_):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, delta_bias))


@opaque.op("terrazzo::selective_scan_backward", _fake_gradients)
def _backward(
    grad: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    orders: Sequence[int],
    width: int,
    merge: bool,
    backend: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; of one that is None an empty tensor.

    The backward pass takes the form of the forward pass, whatever is asked for by then.
    """
    form = fused if backend == "fused" else portable
    call = Scans(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge)
    return tuple(u.new_empty(0) if x is None else x for x in form.backward(call, grad, states))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.orders, ctx.width, ctx.merge, ctx.backend = inputs
    _, states = output
    # A gradient with respect to the states is not defined, and nothing asks for one.
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(states, *tensors)


def _autograd(ctx, grad, _):
    states, *tensors = ctx.saved_tensors
    constants = (ctx.delta_softplus, ctx.orders, ctx.width, ctx.merge, ctx.backend)
    grads = _backward(grad, states, *tensors, *constants)
    return *(None if x is None else g for x, g in zip(tensors, grads)), *(None for _ in constants)


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.selective_scan)
def _flops(u, delta, A, *args, out_shape=None, **kwargs) -> int:
    """Nine multiply-adds for each step, channel and state, which is how published figures count a scan."""
    batch, length, scans, channels = delta
    return 2 * 9 * batch * length * scans * channels * A[2]


@register_flop_formula(torch.ops.terrazzo.selective_scan_backward)
def _backward_flops(grad, states, u, delta, A, *args, **kwargs) -> int:
    """The forward pass again, and twice as much for the gradients."""
    return 3 * _flops(u, delta, A)


def describe(
    device: torch.device, u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge, backend
) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, _decisive(u, delta, A, B, C), fused.STATES.fits(A.shape[2]))
    batch, length, scans, channels = delta.shape
    return Call(
        shape={"B": batch, "L": length, "scans": scans, "D": channels, "N": A.shape[2]},
        parameters={"orders": ", ".join(ORDERS[code] for code in orders)},
        refusals=refusals,
        discouraged=discouraged,
    )


def scan(call: Scans, backend: str) -> torch.Tensor:
    """The output of a call whose arguments were checked."""
    if is_exporting():  # an exported graph holds standard operations only
        return exported.selective_scan(call)
    decisive = _decisive(call.u, call.delta, call.A, call.B, call.C)
    backend = _chosen(backend, call.u.device, decisive, fused.STATES.fits(call.A.shape[2]))
    if backend == "reference":
        return reference.selective_scan(call)
    return _forward(*call, backend)[0]

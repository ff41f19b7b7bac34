"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

from collections.abc import Sequence

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.selective_scan import exported, fused, fused_cpu, portable, reference
from terrazzo.kernels.selective_scan.orders import ORDERS
from terrazzo.kernels.selective_scan.scans import Scans


def _needs(u, delta, A, B, C, *_) -> Needs:
    """The dtype is u's, which the kernels read, or float64 if any tensor is float64."""
    dtype = torch.float64 if accumulator(u, delta, A, B, C) == torch.float64 else u.dtype
    return Needs(u.device, dtype, fused.STATES.misfit(A.shape[-1]))


def _describe(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge, backend) -> Call:
    batch, length, scans, channels = delta.shape
    shape = {"B": batch, "L": length, "scans": scans, "D": channels, "N": A.shape[2]}
    return Call(shape, {"orders": ", ".join(ORDERS[code] for code in orders)})


OPERATOR = Operator("selective_scan", ("fused", "portable"), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu, portable)


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge, backend):
    batch, length, scans, channels = delta.shape
    chunk = _FORMS.of(u.device, backend).CHUNK
    dtype = accumulator(u, delta, A, B, C)
    states = A.new_empty(batch, (length + chunk - 1) // chunk, scans, A.shape[2], channels, dtype=dtype)
    if merge:
        return u.new_empty(batch, length, channels, dtype=dtype), states
    return u.new_empty(delta.shape), states


def _flops(u, delta, A, *args, out_shape=None, **kwargs) -> int:
    """Nine multiply-adds for each step, channel and state, as published figures count a scan."""
    batch, length, scans, channels = delta
    return 2 * 9 * batch * length * scans * channels * A[2]


@OPERATOR.op(fake=_fake, flops=_flops)
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
    """The output, and the state before every chunk of steps, (B, chunks, K, N, D). `run` has chosen `backend`."""
    form = _FORMS.of(u.device, backend)
    return form.forward(Scans(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge))


def _fake_gradients(grad, states, u, delta, A, B, C, D, z, delta_bias, *_):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, delta_bias))


def _backward_flops(grad, states, u, delta, A, *args, **kwargs) -> int:
    """The forward pass again, and twice as much for the gradients."""
    return 3 * _flops(u, delta, A)


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
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
    """Gradients of u, delta, A, B, C, D, z and delta_bias; an empty tensor for an input that is None.

    The backward pass takes the form of the forward pass, even if another backend is requested by then.
    """
    form = _FORMS.of(u.device, backend)
    call = Scans(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, width, merge)
    return tuple(u.new_empty(0) if x is None else x for x in form.backward(call, grad, states))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.orders, ctx.width, ctx.merge, ctx.backend = inputs
    _, states = output
    # The gradient with respect to the states is not defined, and nothing asks for it.
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(states, *tensors)


def _autograd(ctx, grad, _):
    states, *tensors = ctx.saved_tensors
    constants = (ctx.delta_softplus, ctx.orders, ctx.width, ctx.merge, ctx.backend)
    grads = _backward(grad, states, *tensors, *constants)
    return *(None if x is None else g for x, g in zip(tensors, grads)), *(None for _ in constants)


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(call: Scans, backend: str) -> torch.Tensor:
    """Run a call; its arguments are checked."""
    form = OPERATOR.choose(backend, *call)
    if form == EXPORTED:
        return exported.forward(call)
    if form == "reference":
        return reference.selective_scan(call)
    return _forward(*call, form)[0]

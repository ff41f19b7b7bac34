"""The operator's recurrence, and its fused form as PyTorch sees it: one opaque custom op with a gradient.

The portable form is standard operations, which PyTorch differentiates and compiles by itself.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import backend as _backend
from terrazzo.kernels import opaque, triton_host
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting
from terrazzo.kernels.ssd import fused, portable, reference

_STEPS = fused.chunk(2)  # of a chunk, as FLOPs are counted: those of half precision


def _refusals(device: torch.device, dtype: torch.dtype, sizes_fit: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, fused.SIZES.misfit(sizes_fit))


def choose(backend: str, device: torch.device, dtype: torch.dtype, sizes_fit: bool = True) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose("ssd", backend, *_refusals(device, dtype, sizes_fit), opaque=("fused",))


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, sizes_fit: bool) -> str:
    return choose(backend, device, dtype, sizes_fit).name


# As of the other operators: a choice is a constant for Dynamo.
_chosen._dynamo_marked_constant = True


def _fake(x, dt, A, B, C, reverse):
    chunk = fused.chunk(x.dtype.itemsize)
    shape = (x.shape[0], (x.shape[1] + chunk - 1) // chunk, x.shape[2])
    states = x.new_empty(*shape, B.shape[3], x.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), states, x.new_empty(shape, dtype=torch.float32)


@opaque.op("terrazzo::ssd", _fake)
def _forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused.forward(x, dt, A, B, C, reverse)


def _fake_gradients(grad, x, dt, A, B, C, states, whole, reverse):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C))


@opaque.op("terrazzo::ssd_backward", _fake_gradients)
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    states: torch.Tensor,
    whole: torch.Tensor,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused.backward(grad, x, dt, A, B, C, states, whole, reverse)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    _, states, whole = output
    # Gradients with respect to what is kept are not defined, and nothing asks for one.
    ctx.mark_non_differentiable(states, whole)
    ctx.save_for_backward(*tensors, states, whole)


def _autograd(ctx, grad, *_):
    return *_backward(grad, *ctx.saved_tensors, ctx.reverse), None


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.ssd)
def _flops(x, dt, A, B, *args, **kwargs) -> int:
    """The products over chunks: C B^T, its masked product with x, and the states made and read."""
    batch, length, heads, width = x
    return 2 * batch * length * heads * (_STEPS * (B[3] + width) + 2 * B[3] * width)


@register_flop_formula(torch.ops.terrazzo.ssd_backward)
def _backward_flops(grad, *args, **kwargs) -> int:
    """Two products for each of the forward pass, and C B^T again."""
    batch, length, heads, _ = args[0]
    return 2 * _flops(*args) + 2 * batch * length * heads * _STEPS * args[3][3]


def describe(device: torch.device, x, dt, A, B, C, reverse) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, x.dtype, fused.SIZES.fits(B.shape[3], x.shape[3]))
    batch, length, heads, width = x.shape
    shape = {"B": batch, "L": length, "heads": heads, "P": width, "N": B.shape[3]}
    return Call(shape=shape, parameters={}, refusals=refusals, discouraged=discouraged)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    reverse: bool,
    chunk: int,
    backend: str,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = h_t^T C_t; dt is final, else see `terrazzo.kernels.ssd`.

    Returns:
        (B, L, H, P), from the kernels in the dtype of x, else in that of the computation.
    """
    if is_exporting():  # an exported graph holds standard operations only
        return portable.ssd(x, dt, A, B, C, reverse, chunk)
    backend = _chosen(backend, x.device, x.dtype, fused.SIZES.fits(B.shape[3], x.shape[3]))
    if backend == "fused":
        # The kernels' products want one dtype; step sizes and decays stay in float32.
        return _forward(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), reverse)[0]
    if backend == "reference":
        return reference.ssd(x, dt, A, B, C, reverse)
    return portable.ssd(x, dt, A, B, C, reverse, chunk)

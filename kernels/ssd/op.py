"""The operator's recurrence, and its fused form as PyTorch sees it: one opaque custom op with a gradient.

The portable form is standard operations, which PyTorch differentiates and compiles by itself.
"""

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import Call, Needs, Operator
from terrazzo.kernels.ssd import fused, fused_cpu, portable, reference

_STEPS = fused.chunk(2)  # FLOPs are counted for the chunks of half precision


def _needs(x, dt, A, B, C=None, *_) -> Needs:
    """The dtype is x's, which the kernels read, or float64 if any tensor is float64."""
    known = [tensor for tensor in (x, dt, A, B, C) if tensor is not None]
    dtype = torch.float64 if accumulator(*known) == torch.float64 else x.dtype
    return Needs(x.device, dtype, fused.SIZES.misfit(B.shape[3], x.shape[3]))


def _describe(x, dt, A, B, C, reverse) -> Call:
    batch, length, heads, width = x.shape
    return Call({"B": batch, "L": length, "heads": heads, "P": width, "N": B.shape[3]})


OPERATOR = Operator("ssd", ("fused",), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu)


def _fake(x, dt, A, B, C, reverse):
    form, dtype = _FORMS.of(x.device), accumulator(x, dt)
    chunk = form.chunk(x.dtype.itemsize)
    shape = (x.shape[0], (x.shape[1] + chunk - 1) // chunk, x.shape[2])
    states = x.new_empty(*shape, B.shape[3], x.shape[3], dtype=dtype)
    return x.new_empty(x.shape), states, x.new_empty(shape if form is fused else (0,), dtype=dtype)


def _flops(x, dt, A, B, *args, **kwargs) -> int:
    """The products over chunks: C B^T, its masked product with x, and the states made and read."""
    batch, length, heads, width = x
    return 2 * batch * length * heads * (_STEPS * (B[3] + width) + 2 * B[3] * width)


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _FORMS.of(x.device).forward(x, dt, A, B, C, reverse)


def _fake_gradients(grad, x, dt, A, B, C, states, whole, reverse):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C))


def _backward_flops(grad, *args, **kwargs) -> int:
    """Two products for each of the forward pass, and C B^T again."""
    batch, length, heads, _ = args[0]
    return 2 * _flops(*args) + 2 * batch * length * heads * _STEPS * args[3][3]


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
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
    return _FORMS.of(x.device).backward(grad, x, dt, A, B, C, states, whole, reverse)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    _, states, whole = output
    # Gradients with respect to the kept tensors are not defined, and nothing asks for them.
    ctx.mark_non_differentiable(states, whole)
    ctx.save_for_backward(*tensors, states, whole)


def _autograd(ctx, grad, *_):
    return *_backward(grad, *ctx.saved_tensors, ctx.reverse), None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    reverse: bool,
    chunk: int,
    backend: str,
) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = h_t^T C_t, with the final dt; see `terrazzo.kernels.ssd`.

    Returns:
        (B, L, H, P); the fused form returns the dtype of x, the other forms the dtype of the computation.
    """
    form = OPERATOR.choose(backend, x, dt, A, B, C)
    if form == "fused":
        # The kernels' products need one dtype; step sizes and decays stay in float32 at least.
        dtype = accumulator(x, dt, A, B, C)
        x = x.to(dtype) if dtype == torch.float64 else x
        return _forward(x, dt.to(dtype), A.to(dtype), B.to(x.dtype), C.to(x.dtype), reverse)[0]
    if form == "reference":
        return reference.ssd(x, dt, A, B, C, reverse)
    return portable.forward(x, dt, A, B, C, reverse, chunk)

"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.grouped_linear import exported, fused, portable, reference
from terrazzo.kernels.triton_host.machine import Limit

# A program of the kernels looks at the offsets of all groups at once.
GROUPS = Limit(1, 1024, "needs at most 1024 groups")
_FORMS = Forms(gpu=fused, cpu=portable, portable=portable)


def _needs(x, weight, *_) -> Needs:
    return Needs(x.device, x.dtype, GROUPS.misfit(weight.shape[0]))


def _describe(x, weight, bias, offsets, backend) -> Call:
    groups, channels_out, channels_in = weight.shape
    return Call({"groups": groups, "rows": x.shape[0], "in": channels_in, "out": channels_out})


OPERATOR = Operator("grouped_linear", ("fused", "portable"), _needs, _describe)


def _fake(x, weight, bias, offsets, backend):
    return x.new_empty(x.shape[0], weight.shape[1])


def _flops(x, weight, *args, **kwargs) -> int:
    """A product of every row with the matrix of its group."""
    return 2 * x[0] * weight[1] * weight[2]


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, backend: str
) -> torch.Tensor:
    return _FORMS.of(x.device, backend).forward(x, weight, bias, offsets)


def _fake_gradients(grad, x, weight, offsets, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _backward_flops(grad, x, weight, *args, **kwargs) -> int:
    """A product each for the gradients of x and weight."""
    return 2 * _flops(x, weight)


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _FORMS.of(x.device, backend).backward(grad, x, weight, offsets)


def _setup_context(ctx, inputs, output):
    x, weight, bias, offsets, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, offsets)


def _autograd(ctx, grad):
    # The backward pass takes the form of the forward pass, even if another backend is requested by then.
    grad_x, grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, backend: str
) -> torch.Tensor:
    """Run grouped linear layers; arguments are checked."""
    form = OPERATOR.choose(backend, x, weight)
    if form == "reference":
        return reference.grouped_linear(x, weight, bias, offsets)
    if form == EXPORTED:
        return exported.forward(x, weight, bias, offsets)
    return _forward(x, weight, bias, offsets, form)

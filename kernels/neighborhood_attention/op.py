"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

from collections.abc import Sequence

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.exporting import is_open
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.neighborhood_attention import exported, fused, fused_cpu, portable, reference


def _needs(query, key=None, value=None, rpb=None, kernel_size=None, dilation=None, *_) -> Needs:
    slow = None if kernel_size is None else fused_cpu.slow(query.shape[1:3], kernel_size, dilation)
    return Needs(query.device, query.dtype, fused.HEAD_DIM.misfit(query.shape[-1]), slow)


def _describe(query, key, value, rpb, kernel_size, dilation, scale, backend) -> Call:
    shape = dict(zip(("B", "H", "W", "heads", "dim"), query.shape))
    return Call(shape, {"kernel": _per_axis(kernel_size), "dilation": _per_axis(dilation)})


def _per_axis(values: Sequence[int]) -> str:
    """One number if the axes agree (7), else a product (7x5)."""
    return "x".join(map(str, values if len(set(values)) > 1 else values[:1]))


OPERATOR = Operator("neighborhood_attention", ("fused", "portable"), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu, portable)


def _keeps_sums(backend: str, query: torch.Tensor) -> bool:
    """Whether the backward pass needs the output and the softmax' sums. All other forms compute the weights again."""
    return _FORMS.of(query.device, backend) is fused


def _fake(query, key, value, rpb, kernel_size, dilation, scale, backend):
    batch, height, width, heads, _ = query.shape
    rows = (batch, heads, height, width) if _keeps_sums(backend, query) else (0,)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(rows, dtype=torch.float32)


def _flops(query, key, value, rpb, kernel_size, dilation, scale, backend, *args, out_shape=None, **kwargs) -> int:
    """Two products of every query with its window; biases and softmax are not counted, as in dense attention."""
    batch, height, width, heads, dim = query
    return 2 * 2 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithm of each softmax's sum (B, heads, H, W); empty if the backward pass needs none."""
    arguments = (query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)
    if _keeps_sums(backend, query):
        return fused.forward(*arguments)
    return _FORMS.of(query.device, backend).forward(*arguments).contiguous(), query.new_empty(0, dtype=torch.float32)


def _fake_gradients(grad, query, key, value, rpb, out, lse, kernel_size, dilation, scale, backend):
    like = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
    return *like, query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


def _backward_flops(
    grad, query, key, value, rpb, out, lse, kernel_size, dilation, scale, backend, *args, **kwargs
) -> int:
    """Five products: the scores again, the weights' gradient, and one for each of query, key and value."""
    return _flops(query, key, value, rpb, kernel_size, dilation, scale, backend) * 5 // 2


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    window = (tuple(kernel_size), tuple(dilation), scale)
    if out is not None and fused.can_differentiate(rpb, kernel_size):
        grads = fused.backward(grad, query, key, value, rpb, out, lse, *window)
    else:
        form = _FORMS.of(query.device, backend)
        own = form is fused_cpu and fused_cpu.can_differentiate(kernel_size)
        grads = (fused_cpu if own else portable).backward(grad, query, key, value, rpb, *window)
    # An op returns tensors only, so without a bias the bias' gradient is an empty tensor.
    return *(x.contiguous() for x in grads[:3]), query.new_empty(0) if rpb is None else grads[3].contiguous()


def _setup_context(ctx, inputs, output):
    query, key, value, rpb, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend = inputs
    out, lse = output
    # The gradient with respect to the sums is not defined, and nothing asks for it.
    ctx.mark_non_differentiable(lse)
    # The backward pass takes the form of the forward pass, even if another backend is requested by then.
    ctx.save_for_backward(query, key, value, rpb, out if _keeps_sums(ctx.backend, query) else None, lse)


def _autograd(ctx, grad, _):
    query, key, value, rpb, out, lse = ctx.saved_tensors
    window = (ctx.kernel_size, ctx.dilation, ctx.scale)
    grads = _backward(grad, query, key, value, rpb, out, lse, *window, ctx.backend)
    return *grads[:3], None if rpb is None else grads[3], None, None, None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(query, key, value, rpb, kernel_size, dilation, scale, backend) -> torch.Tensor:
    """Run neighborhood attention on a map; arguments are checked and complete."""
    arguments = (query, key, value, rpb, kernel_size, dilation, scale)
    form = OPERATOR.choose(backend, *arguments)
    if form == EXPORTED:
        if is_open(query.shape[1]) or is_open(query.shape[2]):
            raise InputError("neighborhood attention is exported for images of one size: its windows become constants")
        return exported.forward(*arguments)
    if form == "reference":
        return reference.neighborhood_attention(*arguments)
    return _forward(*arguments, form)[0]

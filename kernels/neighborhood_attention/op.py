"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import backend as _backend
from terrazzo.kernels.neighborhood_attention import portable, reference

_REFUSALS = {"fused": "this version has no fused form of neighborhood attention; use backend='portable'"}


def choose(backend: str) -> _backend.Choice:
    return _backend.choose("neighborhood_attention", backend, _REFUSALS)


@torch.library.custom_op("terrazzo::neighborhood_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    backend: str,
) -> torch.Tensor:
    arguments = (query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)
    if choose(backend).name == "reference":
        return reference.neighborhood_attention(*arguments).contiguous()
    return portable.forward(*arguments, mode=portable.Eager).contiguous()


@_forward.register_fake
def _(query, key, value, rpb, kernel_size, dilation, scale, backend):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("terrazzo::neighborhood_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad, query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)
    grads = portable.backward(*arguments, mode=portable.Eager)
    # An op returns tensors only: without a bias its gradient is empty.
    return *(x.contiguous() for x in grads[:3]), query.new_empty(0) if rpb is None else grads[3].contiguous()


@_backward.register_fake
def _(grad, query, key, value, rpb, kernel_size, dilation, scale, backend):
    like = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
    return *like, query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


def _setup_context(ctx, inputs, output):
    query, key, value, rpb, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, rpb)


def _autograd(ctx, grad):
    query, key, value, rpb = ctx.saved_tensors
    grads = _backward(grad, query, key, value, rpb, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend)
    return *grads[:3], None if rpb is None else grads[3], None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.terrazzo.neighborhood_attention)
def _flops(query, key, value, rpb, kernel_size, dilation, scale, backend, *args, out_shape=None, **kwargs) -> int:
    """Two products of every query with its window; biases and softmax are not counted, as in dense attention."""
    batch, height, width, heads, dim = query
    return 2 * 2 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.terrazzo.neighborhood_attention_backward)
def _backward_flops(grad, query, key, value, rpb, kernel_size, dilation, scale, backend, *args, **kwargs) -> int:
    """Five products: the scores again, and one for each gradient and the weights'."""
    return _flops(query, key, value, rpb, kernel_size, dilation, scale, backend) * 5 // 2


def attend(query, key, value, rpb, kernel_size, dilation, scale, backend) -> torch.Tensor:
    """Neighborhood attention on a map, arguments checked and complete."""
    if torch.compiler.is_exporting():  # an exported graph holds standard operations only
        return portable.forward(query, key, value, rpb, kernel_size, dilation, scale, mode=portable.Traced)
    if backend == "reference" or (not torch.compiler.is_compiling() and choose(backend).name == "reference"):
        return reference.neighborhood_attention(query, key, value, rpb, kernel_size, dilation, scale)
    return _forward(query, key, value, rpb, kernel_size, dilation, scale, backend)

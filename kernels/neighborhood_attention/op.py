"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.errors import InputError
from terrazzo.kernels import backend as _backend
from terrazzo.kernels import opaque, triton_host
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting, is_open
from terrazzo.kernels.neighborhood_attention import fused, portable, reference, strided


def _refusals(device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, fused.HEAD_DIM.misfit(head_dim_fits))


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose(
        "neighborhood_attention", backend, *_refusals(device, dtype, head_dim_fits), opaque=("fused", "portable")
    )


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> str:
    return choose(backend, device, dtype, head_dim_fits).name


# Dynamo cannot trace what a choice reads (context, environment, device): it takes the name at its value when tracing.
# This is what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton.
_chosen._dynamo_marked_constant = True


def _name(backend: str, query: torch.Tensor) -> str:
    """Of the backend that runs inside of the op; what `attend` passes is resolved already."""
    if backend != "auto":
        return backend
    return choose(backend, query.device, query.dtype, fused.HEAD_DIM.fits(query.shape[-1])).name


def _fake(query, key, value, rpb, kernel_size, dilation, scale, backend):
    batch, height, width, heads, _ = query.shape
    rows = (batch, heads, height, width) if _name(backend, query) == "fused" else (0,)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(rows, dtype=torch.float32)


@opaque.op("terrazzo::neighborhood_attention", _fake)
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
    """The output, and the logarithm of each softmax's sum (B, heads, H, W), which only the fused form gives."""
    arguments = (query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)
    name = _name(backend, query)
    if name == "fused":
        return fused.forward(*arguments)
    if name == "reference":
        out = reference.neighborhood_attention(*arguments)
    else:
        out = strided.forward(*arguments)
    return out.contiguous(), query.new_empty(0, dtype=torch.float32)


def _fake_gradients(grad, query, key, value, rpb, out, lse, kernel_size, dilation, scale, backend):
    like = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
    return *like, query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


@opaque.op("terrazzo::neighborhood_attention_backward", _fake_gradients)
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
        grads = portable.backward(grad, query, key, value, rpb, *window)
    # An op returns tensors only: without a bias its gradient is empty.
    return *(x.contiguous() for x in grads[:3]), query.new_empty(0) if rpb is None else grads[3].contiguous()


def _setup_context(ctx, inputs, output):
    query, key, value, rpb, ctx.kernel_size, ctx.dilation, ctx.scale, ctx.backend = inputs
    out, lse = output
    # A gradient with respect to the sums is not defined, and nothing asks for one.
    ctx.mark_non_differentiable(lse)
    # The backward pass takes the form of the forward pass, whatever is asked for by then.
    ctx.save_for_backward(query, key, value, rpb, out if _name(ctx.backend, query) == "fused" else None, lse)


def _autograd(ctx, grad, _):
    query, key, value, rpb, out, lse = ctx.saved_tensors
    window = (ctx.kernel_size, ctx.dilation, ctx.scale)
    grads = _backward(grad, query, key, value, rpb, out, lse, *window, ctx.backend)
    return *grads[:3], None if rpb is None else grads[3], None, None, None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.neighborhood_attention)
def _flops(query, key, value, rpb, kernel_size, dilation, scale, backend, *args, out_shape=None, **kwargs) -> int:
    """Two products of every query with its window; biases and softmax are not counted, as in dense attention."""
    batch, height, width, heads, dim = query
    return 2 * 2 * batch * height * width * heads * dim * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.terrazzo.neighborhood_attention_backward)
def _backward_flops(
    grad, query, key, value, rpb, out, lse, kernel_size, dilation, scale, backend, *args, **kwargs
) -> int:
    """Five products: the scores again, and one for each gradient and the weights'."""
    return _flops(query, key, value, rpb, kernel_size, dilation, scale, backend) * 5 // 2


def describe(device: torch.device, query, key, value, rpb, kernel_size, dilation, scale, backend) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, query.dtype, fused.HEAD_DIM.fits(query.shape[-1]))
    return Call(
        shape=dict(zip(("B", "H", "W", "heads", "dim"), query.shape)),
        parameters={"kernel": _per_axis(kernel_size), "dilation": _per_axis(dilation)},
        refusals=refusals,
        discouraged=discouraged,
    )


def _per_axis(values: Sequence[int]) -> str:
    """One number where the axes agree: 7, else 7x5."""
    return "x".join(map(str, values if len(set(values)) > 1 else values[:1]))


def attend(query, key, value, rpb, kernel_size, dilation, scale, backend) -> torch.Tensor:
    """Neighborhood attention on a map, arguments checked and complete."""
    if is_exporting():  # an exported graph holds standard operations only
        if is_open(query.shape[1]) or is_open(query.shape[2]):
            raise InputError("neighborhood attention is exported for images of one size: its windows become constants")
        return portable.forward(query, key, value, rpb, kernel_size, dilation, scale)
    backend = _chosen(backend, query.device, query.dtype, fused.HEAD_DIM.fits(query.shape[-1]))
    if backend == "reference":
        return reference.neighborhood_attention(query, key, value, rpb, kernel_size, dilation, scale)
    return _forward(query, key, value, rpb, kernel_size, dilation, scale, backend)[0]

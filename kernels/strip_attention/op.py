"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import attention_host, opaque, triton_host
from terrazzo.kernels import backend as _backend
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting
from terrazzo.kernels.strip_attention import fused, portable, reference


def _refusals(device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, attention_host.HEAD_DIM.misfit(head_dim_fits))


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose(
        "strip_attention", backend, *_refusals(device, dtype, head_dim_fits), opaque=("fused", "portable")
    )


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> str:
    return choose(backend, device, dtype, head_dim_fits).name


# Dynamo cannot trace what a choice reads (context, environment, device): it takes the name at its value when tracing.
# This is what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton.
_chosen._dynamo_marked_constant = True


def _name(backend: str, value: torch.Tensor) -> str:
    """Of the backend that runs inside of the op; what `attend` passes is resolved already."""
    if backend != "auto":
        return backend
    return _chosen(backend, value.device, value.dtype, attention_host.HEAD_DIM.fits(value.shape[-1]))


def _fake(query, key, value, backend):
    batch, queries, heads = query.shape
    rows = (batch, heads, queries) if _name(backend, value) == "fused" else (0,)
    return value.new_empty(*query.shape, value.shape[-1]), query.new_empty(rows, dtype=torch.float32)


@opaque.op("terrazzo::strip_attention", _fake)
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the sum of each row's exponentials (B, heads, N), which only the fused form gives."""
    name = _name(backend, value)
    if name == "fused":
        return fused.forward(query, key, value)
    out = (reference.strip_attention if name == "reference" else portable.forward)(query, key, value)
    return out.contiguous(), query.new_empty(0, dtype=torch.float32)


def _fake_gradients(grad, query, key, value, sums):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


@opaque.op("terrazzo::strip_attention_backward", _fake_gradients)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The backward pass takes the form of the forward pass, whatever is asked for by then.
    if sums.numel():
        return fused.backward(grad, query, key, value, sums)
    return portable.backward(grad, query, key, value)


def _setup_context(ctx, inputs, output):
    query, key, value, _ = inputs
    _, sums = output
    # A gradient with respect to the sums is not defined, and nothing asks for one.
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(query, key, value, sums)


def _autograd(ctx, grad, _):
    return *_backward(grad, *ctx.saved_tensors), None


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.strip_attention)
def _flops(query, key, value, backend, *args, out_shape=None, **kwargs) -> int:
    """A product of every query with every key, and of its weights with the values; softmax is not counted."""
    batch, keys, heads, dim = value
    return 2 * batch * heads * query[1] * keys * (1 + dim)


@register_flop_formula(torch.ops.terrazzo.strip_attention_backward)
def _backward_flops(grad, query, key, value, sums, *args, **kwargs) -> int:
    """The scores again, the weights' gradient and the values', and one product each for queries and keys."""
    batch, keys, heads, dim = value
    return 2 * batch * heads * query[1] * keys * (3 + 2 * dim)


def describe(device: torch.device, query, key, value, backend) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, value.dtype, attention_host.HEAD_DIM.fits(value.shape[-1]))
    batch, keys, heads, dim = value.shape
    return Call(
        shape={"B": batch, "queries": query.shape[1], "keys": keys, "heads": heads, "dim": dim},
        parameters={},
        refusals=refusals,
        discouraged=discouraged,
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
    """Strip attention, arguments checked."""
    if is_exporting():  # an exported graph holds standard operations only
        return portable.whole(query, key, value)
    backend = _chosen(backend, value.device, value.dtype, attention_host.HEAD_DIM.fits(value.shape[-1]))
    if backend == "reference":
        return reference.strip_attention(query, key, value)
    # A compiler sees one op, whatever the sizes.
    if backend == "portable" and not torch.compiler.is_compiling() and portable.is_whole(query, value):
        return portable.whole(query, key, value)
    return _forward(query, key, value, backend)[0]

"""The choice of a form, and the fused one as PyTorch sees it: one opaque custom op with a gradient and a FLOP formula.

The portable form is standard operations, which PyTorch differentiates by itself.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import attention_host, opaque, triton_host
from terrazzo.kernels import backend as _backend
from terrazzo.kernels.call import Call
from terrazzo.kernels.varlen_attention import fused, portable, reference


def _refusals(device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, attention_host.HEAD_DIM.misfit(head_dim_fits))


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose("varlen_attention", backend, *_refusals(device, dtype, head_dim_fits), opaque=("fused",))


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> str:
    return choose(backend, device, dtype, head_dim_fits).name


# As of the other operators: a choice is a constant for Dynamo.
_chosen._dynamo_marked_constant = True


def _fake(query, key, value, offsets, longest):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@opaque.op("terrazzo::varlen_attention", _fake)
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return fused.forward(query, key, value, offsets, longest)


def _fake_gradients(grad, query, key, value, offsets, longest, out, lse):
    return tuple(out.new_empty(out.shape) for _ in range(3))


@opaque.op("terrazzo::varlen_attention_backward", _fake_gradients)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused.backward(grad, query, key, value, offsets, longest, out, lse)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.longest = inputs
    out, lse = output
    # A gradient with respect to the logarithms is not defined, and nothing asks for one.
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _autograd(ctx, grad, _):
    query, key, value, offsets, out, lse = ctx.saved_tensors
    return *_backward(grad, query, key, value, offsets, ctx.longest, out, lse), None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


@register_flop_formula(torch.ops.terrazzo.varlen_attention)
def _flops(query, key, value, offsets, longest, *args, **kwargs) -> int:
    """Scores and their product with values, as if every sequence were the longest; softmax is not counted."""
    tokens, heads, width = query
    return 4 * tokens * longest * heads * width


@register_flop_formula(torch.ops.terrazzo.varlen_attention_backward)
def _backward_flops(grad, query, key, value, offsets, longest, *args, **kwargs) -> int:
    """The scores twice, the weights' gradient twice, and one product each for queries, keys and values."""
    return 7 * _flops(query, key, value, offsets, longest) // 2


def describe(device: torch.device, query, key, value, offsets, longest) -> Call:
    """What `terrazzo explain` says of a call of the op: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, query.dtype, attention_host.HEAD_DIM.fits(query.shape[2]))
    tokens, heads, width = query.shape
    shape = {"B": len(offsets) - 1, "tokens": tokens, "longest": longest, "heads": heads, "dim": width}
    return Call(shape=shape, parameters={}, refusals=refusals, discouraged=discouraged)


def attend(query, key, value, offsets: torch.Tensor, longest: int | None, backend: str) -> torch.Tensor:
    """Attention within sequences, arguments checked."""
    backend = _chosen(backend, query.device, query.dtype, attention_host.HEAD_DIM.fits(query.shape[-1]))
    if backend == "fused":
        if longest is None:
            longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
        return _forward(query, key, value, offsets, longest)[0]
    form = reference if backend == "reference" else portable
    return form.varlen_attention(query, key, value, offsets)

"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.strip_attention import exported, fused, fused_cpu, portable, reference
from terrazzo.kernels.triton_host.blocks import HEAD_DIM


def _needs(query, key, value, *_) -> Needs:
    return Needs(value.device, value.dtype, HEAD_DIM.misfit(value.shape[-1]), _slow(query, key, value))


# Up to this number of weights, gradients by standard operations cost less than an op.
_FEW = 1 << 17


def _slow(query, key, value) -> str | None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler sees one op for all sizes
        return None
    if query.numel() * value.shape[1] > _FEW or not any(x.requires_grad for x in (query, key, value)):
        return None
    return f"takes longer than standard operations for the gradients of at most {_FEW} weights"


def _describe(query, key, value, backend) -> Call:
    batch, keys, heads, dim = value.shape
    return Call({"B": batch, "queries": query.shape[1], "keys": keys, "heads": heads, "dim": dim})


OPERATOR = Operator("strip_attention", ("fused", "portable"), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu, portable)


def _fake(query, key, value, backend):
    batch, queries, heads = query.shape
    rows = (batch, heads, queries) if _FORMS.of(value.device, backend) is fused else (0,)
    return value.new_empty(*query.shape, value.shape[-1]), query.new_empty(rows, dtype=torch.float32)


def _flops(query, key, value, backend, *args, out_shape=None, **kwargs) -> int:
    """A product of every query with every key, and of its weights with the values; softmax is not counted."""
    batch, keys, heads, dim = value
    return 2 * batch * heads * query[1] * keys * (1 + dim)


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and for the kernels on GPUs the sum of each row's exponentials (B, heads, N)."""
    form = _FORMS.of(value.device, backend)
    if form is portable:
        return portable.forward(query, key, value).contiguous(), query.new_empty(0, dtype=torch.float32)
    return form.forward(query, key, value)


def _fake_gradients(grad, query, key, value, sums, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _backward_flops(grad, query, key, value, sums, *args, **kwargs) -> int:
    """The scores again, the gradients of weights and values, and one product each for queries and keys."""
    batch, keys, heads, dim = value
    return 2 * batch * heads * query[1] * keys * (3 + 2 * dim)


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sums: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    form = _FORMS.of(value.device, backend)
    if form is portable:
        return portable.backward(grad, query, key, value)
    return form.backward(grad, query, key, value, sums)


def _setup_context(ctx, inputs, output):
    # The backward pass takes the form of the forward pass, even if another backend is requested by then.
    query, key, value, ctx.backend = inputs
    _, sums = output
    # The gradient with respect to the sums is not defined, and nothing asks for it.
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(query, key, value, sums)


def _autograd(ctx, grad, _):
    return *_backward(grad, *ctx.saved_tensors, ctx.backend), None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
    """Run strip attention; arguments are checked."""
    form = OPERATOR.choose(backend, query, key, value)
    if form == "reference":
        return reference.strip_attention(query, key, value)
    # A compiler sees one op for all sizes.
    if form == EXPORTED or (form == "portable" and not torch.compiler.is_compiling() and _is_small(query, value)):
        return exported.forward(query, key, value)
    return _forward(query, key, value, form)[0]


# Up to this number of weights, keeping them costs less than the op, which recomputes them in the backward pass.
_SMALL = 1 << 18


def _is_small(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call is computed at once: on a CPU, and not in half precision (`portable.forward` uses float32)."""
    weights = query.numel() * value.shape[1]
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64) and weights <= _SMALL

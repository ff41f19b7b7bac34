"""The choice of a form, and the fused form as PyTorch sees it: an opaque custom op with a gradient and a FLOP formula.

The portable form consists of standard operations, which PyTorch differentiates by itself.
"""

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.operator import Call, Needs, Operator
from terrazzo.kernels.triton_host.blocks import HEAD_DIM
from terrazzo.kernels.varlen_attention import fused, portable, reference


def _needs(query, *_) -> Needs:
    return Needs(query.device, query.dtype, HEAD_DIM.misfit(query.shape[-1]))


def _describe(query, key, value, cu_seqlens, max_seqlen) -> Call:
    tokens, heads, width = query.shape
    return Call({"B": len(cu_seqlens) - 1, "tokens": tokens, "max_seqlen": max_seqlen, "heads": heads, "dim": width})


OPERATOR = Operator("varlen_attention", ("fused",), _needs, _describe)


def _fake(query, key, value, cu_seqlens, max_seqlen):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


def _flops(query, key, value, cu_seqlens, max_seqlen, *args, **kwargs) -> int:
    """Scores and their product with values, as if all sequences had length `max_seqlen`; softmax is not counted."""
    tokens, heads, width = query
    return 4 * tokens * max_seqlen * heads * width


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return fused.forward(query, key, value, cu_seqlens, max_seqlen)


def _fake_gradients(grad, query, key, value, cu_seqlens, max_seqlen, out, lse):
    return tuple(out.new_empty(out.shape) for _ in range(3))


def _backward_flops(grad, query, key, value, cu_seqlens, max_seqlen, *args, **kwargs) -> int:
    """The scores twice, the weights' gradient twice, and one product each for queries, keys and values."""
    return 7 * _flops(query, key, value, cu_seqlens, max_seqlen) // 2


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused.backward(grad, query, key, value, cu_seqlens, max_seqlen, out, lse)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.max_seqlen = inputs
    out, lse = output
    # The gradient with respect to the logarithms is not defined, and nothing asks for it.
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _autograd(ctx, grad, _):
    query, key, value, cu_seqlens, out, lse = ctx.saved_tensors
    return *_backward(grad, query, key, value, cu_seqlens, ctx.max_seqlen, out, lse), None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(query, key, value, cu_seqlens: torch.Tensor, max_seqlen: int | None, backend: str) -> torch.Tensor:
    """Run attention within sequences; arguments are checked."""
    form = OPERATOR.choose(backend, query)
    if form == "fused":
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        return _forward(query, key, value, cu_seqlens, max_seqlen)[0]
    if form == "reference":
        return reference.varlen_attention(query, key, value, cu_seqlens)
    return portable.forward(query, key, value, cu_seqlens)

"""The choice of a form, and attention to one segment as PyTorch sees it: an opaque custom op with a gradient.

A plan of several segments is several calls of the op. Each also returns the logarithm of its rows' sums, which has a
gradient, and `merging.merge` makes one softmax of them.
"""

import functools

import torch

from terrazzo.kernels.block_sparse_attention import exported, fused, fused_cpu, lowering, merging, portable, reference
from terrazzo.kernels.block_sparse_attention.plan import Plan
from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.fused import Forms
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.triton_host.blocks import HEAD_DIM


def _needs(query, key, value, *_) -> Needs:
    return Needs(query.device, query.dtype, HEAD_DIM.misfit(query.shape[-1], value.shape[-1]))


def _listed(index: torch.Size | None, key: torch.Size, key_tile: int) -> int:
    """The keys of a query, from the shapes of index and keys: full lists of whole blocks."""
    return key[2] if index is None else index[3] * key_tile


def _describe(query, key, value, index, bias, query_tile, key_tile, scale, backend) -> Call:
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    density = _listed(None if index is None else index.shape, key.shape, key_tile) / keys
    shape = {"B": batch, "heads": heads, "queries": queries, "keys": keys, "dim": dim}
    return Call(shape, {"tiles": f"{query_tile}x{key_tile}", "density": f"{density:.3g}"})


OPERATOR = Operator("block_sparse_attention", ("fused", "portable"), _needs, _describe, cpu=True)
_FORMS = Forms(fused, fused_cpu, portable)


def _fake(query, key, value, index, bias, query_tile, key_tile, scale, backend):
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[-1]), query.new_empty(shape, dtype=accumulator(query))


def _flops(query, key, value, index, bias, query_tile, key_tile, *args, **kwargs) -> int:
    """Scores of the listed pairs and their product with the values; softmax is not counted, nor is what is short."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * _listed(index, key, key_tile) * (dim + value[3])


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_tile: int,
    key_tile: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys of one segment; see `lowering.Keys`."""
    form = _FORMS.of(query.device, backend)
    return form.forward(query, key, value, index, bias, query_tile, key_tile, scale)


def _fake_gradients(grad, grad_lse, query, key, value, index, bias, *_):
    like = [x.new_empty(x.shape) for x in (query, key, value)]
    return *like, query.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _backward_flops(grad, grad_lse, query, key, value, index, bias, out, lse, query_tile, key_tile, *_, **__) -> int:
    """The scores again, the gradient of the weights, and one product each for queries, keys and values."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * _listed(index, key, key_tile) * (3 * dim + 2 * value[3])


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_tile: int,
    key_tile: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (grad, grad_lse, query, key, value, index, bias, out, lse, query_tile, key_tile, scale)
    # The backward pass takes the form of the forward pass, even if another backend is requested by then.
    *grads, grad_bias = _FORMS.of(query.device, backend).backward(*arguments)
    # An op returns tensors only, so without a bias the bias' gradient is an empty tensor.
    return *grads, query.new_empty(0) if grad_bias is None else grad_bias


def _setup_context(ctx, inputs, output):
    *tensors, query_tile, key_tile, scale, backend = inputs
    ctx.constants = query_tile, key_tile, scale, backend
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad, grad_lse):
    grads = _backward(grad, grad_lse, *ctx.saved_tensors, *ctx.constants)
    bias = ctx.saved_tensors[4]
    return *grads[:3], None, None if bias is None else grads[3], None, None, None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    plan: Plan,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run attention by a plan; arguments are checked."""
    segments = lowering.lower(plan, key, value, accumulator(query))
    form = OPERATOR.choose(backend, query, segments[0].key, segments[0].value)
    if form == "reference":
        return reference.block_sparse_attention(query, key, value, plan, scale)
    rows = merging.in_slots(query, plan.query_order)
    if form == EXPORTED:
        out, lse = exported.forward(rows, segments, plan.query_tile, scale)
    else:
        parts = []
        for own_key, own_value, index, bias, tile, shift in segments:
            out, lse = _forward(rows, own_key, own_value, index, bias, plan.query_tile, tile, scale, form)
            # A bias that all keys share changes no weight of the segment.
            parts.append((out, lse + shift))
        out, lse = functools.reduce(merging.merge, parts)
    return merging.from_slots(out, lse, plan.query_order, plan.merge, query.shape[2])

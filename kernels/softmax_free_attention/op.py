"""The operator as PyTorch sees it: one opaque custom op with a fake form, a gradient and a FLOP formula."""

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator, ieee_products, without_autocast
from terrazzo.kernels.dispatch.operator import EXPORTED, Call, Needs, Operator
from terrazzo.kernels.softmax_free_attention import composed, exported, fused, portable, reference
from terrazzo.kernels.triton_host.blocks import HEAD_DIM


def _needs(query, key, value, landmark, *_) -> Needs:
    wide = any(x.dtype == torch.float64 for x in (query, value, landmark))
    return Needs(value.device, torch.float64 if wide else value.dtype, HEAD_DIM.misfit(value.shape[-1]))


def _describe(query, key, value, landmark, normalised, *_) -> Call:
    sizes = dict(zip(("B", "heads", "tokens", "dim"), value.shape))
    return Call({**sizes, "landmarks": landmark.shape[2]}, {"inverse": "SOFT++" if normalised else "SOFT"})


OPERATOR = Operator("softmax_free_attention", ("fused", "portable"), _needs, _describe)


def _form(backend: str):
    return fused if backend == "fused" else portable


def _fake(query, key, value, landmark, normalised, alpha_scope, implicit, backend):
    dtype, size = accumulator(query, value, landmark), landmark.shape[2]
    sums = landmark.new_empty(landmark.shape, dtype=dtype)
    inverse = landmark.new_empty((*landmark.shape[:2], size, size), dtype=dtype)
    return portable.empty_tokens(value, value.dtype), sums, inverse


def _flops(query, key, value, landmark, *args, out_shape=None, **kwargs) -> int:
    """Products only: distances once for each set of tokens, sums of values, Newton's steps, sums of rows."""
    batch, heads, tokens, dim = value
    size = landmark[2]
    pairs = tokens * size * dim * (3 if key is None else 4)
    return 2 * batch * heads * (pairs + 2 * size**2 * dim + 2 * reference.STEPS * size**3)


@OPERATOR.op(fake=_fake, flops=_flops)
def _forward(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
    implicit: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what the backward pass needs: sums of values, and the inverse before its normalisation."""
    with without_autocast(value), ieee_products():
        return composed.forward(_form(backend), query, key, value, landmark, normalised, alpha_scope)


def _fake_gradients(grad, query, key, value, landmark, *_):
    grad_key = query.new_empty(0) if key is None else portable.empty_tokens(key, key.dtype)
    tokens = (portable.empty_tokens(x, x.dtype) for x in (query, value))
    return next(tokens), grad_key, next(tokens), landmark.new_empty(landmark.shape)


def _backward_flops(
    grad, query, key, value, landmark, sums, inverse, normalised, alpha_scope, implicit, *args, **kwargs
) -> int:
    """Distances again and four products for each of two sets of pairs, and the gradient of the inverse."""
    batch, heads, tokens, dim = value
    size = landmark[2]
    steps = 7 * reference.STEPS if normalised and not implicit else 2
    return 2 * batch * heads * (10 * tokens * size * dim + 4 * size**2 * dim + steps * size**3)


@OPERATOR.op("backward", fake=_fake_gradients, flops=_backward_flops)
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    landmark: torch.Tensor,
    sums: torch.Tensor,
    inverse: torch.Tensor,
    normalised: bool,
    alpha_scope: str,
    implicit: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by query, key (empty without a key), value and landmark."""
    with without_autocast(value), ieee_products():
        grad_query, grad_key, *others = composed.backward(
            _form(backend), grad, query, key, value, landmark, sums, inverse, normalised, alpha_scope, implicit
        )
    return grad_query, query.new_empty(0) if grad_key is None else grad_key, *others


def _setup_context(ctx, inputs, output):
    query, key, value, landmark, *ctx.options = inputs
    _, sums, inverse = output
    # Gradients with respect to the last two are not defined, and nothing asks for them.
    ctx.mark_non_differentiable(sums, inverse)
    ctx.save_for_backward(query, key, value, landmark, sums, inverse)


def _autograd(ctx, grad, *_):
    query, key, *others = ctx.saved_tensors
    grad_query, grad_key, grad_value, grad_landmark = _backward(grad, query, key, *others, *ctx.options)
    return grad_query, None if key is None else grad_key, grad_value, grad_landmark, None, None, None, None


opaque.register_gradient(_forward, _autograd, _setup_context)


def run(query, key, value, landmark, normalised, alpha_scope, implicit, backend) -> torch.Tensor:
    """Run softmax-free attention; arguments are checked."""
    tensors = (query, key, value, landmark)
    form = OPERATOR.choose(backend, *tensors)
    with without_autocast(value):
        if form == EXPORTED:
            return exported.forward(*tensors, normalised, alpha_scope)
        if form == "reference":
            return reference.softmax_free_attention(*tensors, normalised, alpha_scope, implicit)
    return _forward(*tensors, normalised, alpha_scope, implicit, form)[0]

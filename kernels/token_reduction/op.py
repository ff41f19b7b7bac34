"""The choice of a form, and the fused forms as PyTorch sees them: opaque custom ops, pooling with a gradient.

The portable form consists of standard operations, which PyTorch differentiates, compiles and exports by itself.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.fused import Forms, is_for_cpu
from terrazzo.kernels.dispatch.operator import Call, Needs, Operator
from terrazzo.kernels.token_reduction import fused, fused_cpu, portable, reference
from terrazzo.kernels.token_reduction.partition import sizes
from terrazzo.kernels.triton_host.blocks import HEAD_DIM


def _needs(x, *_) -> Needs:
    return Needs(x.device, x.dtype)


def _attention_needs(query, *_) -> Needs:
    return Needs(query.device, query.dtype, HEAD_DIM.misfit(query.shape[-1]))


def _describe(metric, r, size, importance, protect, criteria, bidirectional, grid) -> Call:
    batch, count, width = metric.shape
    return Call(
        {"B": batch, "tokens": count, "merged": r, "channels": width},
        {"partition": "cell2x2" if len(grid) else "even_odd", "ways": "2" if bidirectional else "1"},
    )


OPERATOR = Operator("token_reduction", ("fused",), _needs, _describe, cpu=True)
# The mean of attention: to users it is the same operator, but its kernels have other limits.
ATTENTION = dataclasses.replace(OPERATOR, needs=_attention_needs)
_FORMS = Forms(fused, fused_cpu)


def _fake_plan(metric, r, size, importance, protect, criteria, bidirectional, grid):
    return metric.new_empty(metric.shape[:2], dtype=torch.int64)


def _plan_flops(metric, r, size, importance, protect, criteria, bidirectional, grid, *args, **kwargs) -> int:
    """The cosines. (On a GPU a two-way plan computes them twice.)"""
    batch, count, width = metric
    sources, targets = sizes(count - protect, protect, tuple(grid) or None)
    return 2 * batch * sources * targets * width


@OPERATOR.op(fake=_fake_plan, flops=_plan_flops)
def _plan(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: Sequence[float],
    bidirectional: bool,
    grid: Sequence[int],
) -> torch.Tensor:
    """`plan` of a fused form; `grid` is empty for the partition "even_odd"."""
    form = _FORMS.of(metric.device)
    return form.plan(metric, r, size, importance, protect, criteria, bidirectional, tuple(grid) or None)


def plan(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: Sequence[float],
    bidirectional: bool,
    grid: tuple[int, int] | None,
    backend: str,
) -> torch.Tensor:
    """The maps (B, N). Arguments are checked; they are as in `reference.match`, with a batch axis in front."""
    form = OPERATOR.choose(backend, metric)
    if form == "fused" and r > 0:
        return _plan(metric, r, size, importance, protect, criteria, bidirectional, grid or ())
    chosen = reference if form == "reference" else portable
    metric = metric.to(accumulator(metric))  # only the kernels read half precision directly
    return chosen.plan(metric, r, size, importance, protect, criteria, bidirectional, grid)


def _fake_pool(x, assignment, count, weight, size):
    rows = (x.shape[0], count)
    return x.new_empty(*rows, x.shape[2]), weight.new_empty(rows), weight.new_empty(rows)


@OPERATOR.op("pool", fake=_fake_pool)
def _pool(
    x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor, size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _FORMS.of(x.device).pool(x, assignment, count, weight, size)


def _fake_pool_gradient(grad, assignment, weight, total):
    return grad.new_empty(*assignment.shape, grad.shape[2])


@OPERATOR.op("pool_backward", fake=_fake_pool_gradient)
def _pool_backward(
    grad: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    return _FORMS.of(grad.device).pool_backward(grad, assignment, weight, total)


def _setup_context(ctx, inputs, output):
    _, assignment, _, weight, _ = inputs
    _, found, total = output
    ctx.mark_non_differentiable(found, total)
    ctx.save_for_backward(assignment, weight, total)


def _autograd(ctx, grad, *_):
    return _pool_backward(grad, *ctx.saved_tensors), None, None, None, None


def _setup_second(ctx, inputs, output):
    grad, assignment, weight, _ = inputs
    ctx.count = grad.shape[1]
    ctx.save_for_backward(assignment, weight)


def _second(ctx, grad):
    """Pooling is linear, so the gradient of its gradient is pooling."""
    assignment, weight = ctx.saved_tensors
    return _pool(grad, assignment, ctx.count, weight, weight)[0], None, None, None


opaque.register_gradient(_pool, _autograd, _setup_context)
opaque.register_gradient(_pool_backward, _second, _setup_second)


def pool(
    x: torch.Tensor,
    assignment: torch.Tensor,
    count: int,
    weight: torch.Tensor,
    size: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of groups (B, count, C), and their sizes (B, count) in the dtype of `size`. Only x gets a gradient."""
    form, weight = OPERATOR.choose(backend, x), weight.detach()
    if form == "fused":
        dtype = accumulator(x)
        out, found, _ = _pool(x, assignment, count, weight.to(dtype), size.detach().to(dtype))
        return out, found.to(size.dtype)
    chosen = reference if form == "reference" else portable
    return chosen.pool(x, assignment, count, weight), portable.add_up(size, assignment, count)


def _fake_column_mean(query, key, bias):
    return query.new_empty(query.shape[0], query.shape[2], dtype=accumulator(query))


def _score_flops(query, key, bias, *args, **kwargs) -> int:
    """The scores; softmax is not counted. (On a GPU the mean computes them twice.)"""
    batch, heads, count, width = query
    return 2 * batch * heads * count * count * width


@ATTENTION.op("column_mean", fake=_fake_column_mean, flops=_score_flops)
def _column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _FORMS.of(query.device).column_mean(query, key, bias)


def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    """The attention that each key receives (B, N), without a gradient; arguments are checked."""
    form = ATTENTION.choose(backend, query)
    if form == "fused":
        return _column_mean(query.detach(), key.detach(), None if bias is None else bias.detach())
    chosen = reference if form == "reference" else portable
    return chosen.column_mean(query, key, bias).detach()


def _fake_weights(query, key, bias):
    batch, heads, count, _ = query.shape
    dtype = accumulator(query)
    weights = query.new_empty(batch, heads, count, count, dtype=dtype)
    return weights, query.new_empty(batch, count, dtype=dtype)


@ATTENTION.op("weights", fake=_fake_weights, flops=_score_flops)
def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights (B, H, N, N) and the attention that each key receives (B, N), on a CPU."""
    return fused_cpu.weights(query, key, bias)


def _setup_weights(ctx, inputs, output):
    weights, mean = output
    ctx.mark_non_differentiable(mean)
    ctx.save_for_backward(*inputs, weights)


def _weights_gradient(ctx, grad, _):
    """In standard operations, which have gradients themselves."""
    query, key, bias, weights = ctx.saved_tensors
    of_scores = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    of_bias = of_scores.sum((1, 2)).to(bias.dtype) if ctx.needs_input_grad[2] else None
    of_scores, scale = of_scores.to(query.dtype), 1 / math.sqrt(query.shape[-1])
    return of_scores @ key * scale, of_scores.transpose(-1, -2) @ query * scale, of_bias


opaque.register_gradient(_weights, _weights_gradient, _setup_weights)


def _fake_attended(weights, value):
    batch, heads, count, width = value.shape
    return value.new_empty(batch, count, heads, width).transpose(1, 2)


def _attended_flops(weights, value, *args, **kwargs) -> int:
    batch, heads, count, width = value
    return 2 * batch * heads * count * count * width


@ATTENTION.op("attended", fake=_fake_attended, flops=_attended_flops)
def _attended(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output of attention with given weights, on a CPU."""
    return fused_cpu.attend(weights, value)


def _setup_attended(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _attended_gradient(ctx, grad):
    """In standard operations, which have gradients themselves."""
    weights, value = ctx.saved_tensors
    of_weights = (grad @ value.transpose(-1, -2)).to(weights.dtype) if ctx.needs_input_grad[0] else None
    return of_weights, weights.to(value.dtype).transpose(-1, -2) @ grad


opaque.register_gradient(_attended, _attended_gradient, _setup_attended)


def attention(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Like `portable.attention`, in the form that "auto" chooses; arguments are checked."""
    if ATTENTION.choose("auto", query) != "fused":
        return portable.attention(query, key, bias)
    if is_for_cpu(query.device) and portable.is_whole(query):
        weights, mean = _weights(query, key, bias)
        return mean, partial(_attended, weights)
    return column_mean(query, key, bias, "fused"), partial(portable.attend, query, key, bias)

"""The choice of a form, and the fused ones as PyTorch sees them: opaque custom ops, pooling with a gradient.

The portable form is standard operations, which PyTorch differentiates and compiles by itself.
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from terrazzo.kernels import attention_host, opaque, triton_host
from terrazzo.kernels import backend as _backend
from terrazzo.kernels.call import Call
from terrazzo.kernels.exporting import is_exporting
from terrazzo.kernels.token_reduction import fused
from terrazzo.kernels.token_reduction.partition import sizes


def _refusals(device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> tuple[dict[str, str], dict[str, str]]:
    return triton_host.refusals(device, dtype, attention_host.HEAD_DIM.misfit(head_dim_fits))


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool = True) -> _backend.Choice:
    """The backend of a call on such tensors, and why."""
    return _backend.choose(
        "token_reduction", _backend.check_name(backend), *_refusals(device, dtype, head_dim_fits), opaque=("fused",)
    )


def _name(backend: str, device: torch.device, dtype: torch.dtype, head_dim_fits: bool) -> str:
    return choose(backend, device, dtype, head_dim_fits).name


# As of the other operators: a choice is a constant for Dynamo.
_name._dynamo_marked_constant = True


def chosen(backend: str, x: torch.Tensor, head_dim_fits: bool = True) -> str:
    """The name of the backend of a call on `x`; an exported graph holds standard operations only."""
    if is_exporting():
        return "portable"
    return _name(backend, x.device, x.dtype, head_dim_fits)


def _fake_plan(metric, r, size, importance, protect, criteria, bidirectional, grid):
    return metric.new_empty(metric.shape[:2], dtype=torch.int64)


@opaque.op("terrazzo::token_reduction", _fake_plan)
def plan(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: Sequence[float],
    bidirectional: bool,
    grid: Sequence[int],
) -> torch.Tensor:
    """`fused.plan`; `grid` is empty for the partition "even_odd"."""
    return fused.plan(metric, r, size, importance, protect, criteria, bidirectional, tuple(grid) or None)


@register_flop_formula(torch.ops.terrazzo.token_reduction)
def _plan_flops(metric, r, size, importance, protect, criteria, bidirectional, grid, *args, **kwargs) -> int:
    """The cosines, once for each direction."""
    batch, count, width = metric
    sources, targets = sizes(count - protect, protect, tuple(grid) or None)
    return 2 * batch * sources * targets * width * (1 + bidirectional)


def describe(device: torch.device, metric, r, size, importance, protect, criteria, bidirectional, grid) -> Call:
    """What `terrazzo explain` says of a plan: see `terrazzo.kernels.call`."""
    refusals, discouraged = _refusals(device, metric.dtype, True)
    batch, count, width = metric.shape
    return Call(
        shape={"B": batch, "tokens": count, "merged": r, "channels": width},
        parameters={"partition": "cell2x2" if len(grid) else "even_odd", "ways": "2" if bidirectional else "1"},
        refusals=refusals,
        discouraged=discouraged,
    )


def _fake_pool(x, assignment, count, weight, size):
    rows = (x.shape[0], count)
    return x.new_empty(*rows, x.shape[2]), weight.new_empty(rows), weight.new_empty(rows)


@opaque.op("terrazzo::token_reduction_pool", _fake_pool)
def _pool(
    x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor, size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fused.pool(x, assignment, count, weight, size)


def _fake_pool_gradient(grad, assignment, weight, total):
    return grad.new_empty(*assignment.shape, grad.shape[2])


@opaque.op("terrazzo::token_reduction_pool_backward", _fake_pool_gradient)
def _pool_backward(
    grad: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    return fused.pool_backward(grad, assignment, weight, total)


def _setup_context(ctx, inputs, output):
    _, assignment, _, weight, _ = inputs
    _, found, total = output
    ctx.mark_non_differentiable(found, total)
    ctx.save_for_backward(assignment, weight, total)


def _autograd(ctx, grad, *_):
    return _pool_backward(grad, *ctx.saved_tensors), None, None, None, None


opaque.register_gradient(_pool, _autograd, _setup_context)


def pool(
    x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor, size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of groups (B, count, C), with x's gradient alone, and their sizes (B, count) in the dtype of `size`."""
    out, found, _ = _pool(x, assignment, count, weight.detach().float(), size.detach().float())
    return out, found.to(size.dtype)


def _fake_column_mean(query, key, bias):
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)


@opaque.op("terrazzo::token_reduction_column_mean", _fake_column_mean)
def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return fused.column_mean(query, key, bias)


@register_flop_formula(torch.ops.terrazzo.token_reduction_column_mean)
def _column_mean_flops(query, key, bias, *args, **kwargs) -> int:
    """Every score twice; softmax is not counted."""
    batch, heads, count, width = query
    return 4 * batch * heads * count * count * width

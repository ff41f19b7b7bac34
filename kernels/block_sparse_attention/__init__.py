"""Attention to chosen keys: a plan lists blocks of keys, or single keys, for every tile of queries."""

from typing import Any

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import lowering, op
from terrazzo.kernels.block_sparse_attention.plan import Plan, Segment, check, check_keys, plan_to_mask
from terrazzo.kernels.dispatch import arguments

__all__ = ["Plan", "Segment", "block_sparse_attention", "plan_to_mask"]


def _check(query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, plan: Plan) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    keys: dict[str, Any] = {} if key is None and value is None else {"key": key, "value": value}
    arguments.check_tensors({"query": query, **keys})
    if query.dim() != 4 or arguments.any_empty(*query.shape[1:]):
        raise InputError(
            f"query must be (B, H, Nq, D) with at least 1 head, query and channel, got {tuple(query.shape)}"
        )
    if keys:
        check_keys(query, keys["key"], keys["value"])
    check(plan, query, key, value)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    plan: Plan,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every tile of queries to the keys that a plan lists, in one softmax.

        lse_i = ln sum_j c_ij exp(scale q_i k_j + bias_j)
        out_i = sum_j c_ij exp(scale q_i k_j + bias_j - lse_i) v_j

    where c_ij says how often the plan lists key j for query i. A query without keys has out 0, lse -inf, no gradient.
    Under autocast, queries, keys and values are rounded as for PyTorch's attention.

    Args:
        query: (B, H, Nq, D), any strides.
        key: (B, H, Nk, D), or None if all segments have their own.
        value: (B, H, Nk, Dv), or None.
        plan: see `Plan` and `Segment`. Its indices have no gradient; keys, values and biases in it have.
        scale: the factor of the products; None is 1 / sqrt(D).
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        out: (B, H, Nq, Dv).
        lse: (B, H, Nq), float32, or float64 if the queries are. It has a gradient.

    Raises:
        InputError: A shape, dtype or number that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.
    """
    query, key, value, plan = lowering.autocast(query, key, value, plan)
    _check(query, key, value, plan)
    scale = query.shape[-1] ** -0.5 if scale is None else arguments.finite(scale, "scale")
    return op.run(query, key, value, plan, scale, backend)

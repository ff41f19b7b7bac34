"""Means of the tokens that a plan merges, and the way back to every position."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.kernels.token_reduction import op
from terrazzo.kernels.token_reduction.planning import Plan


def merge(
    x: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | None = None,
    size: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted mean of each group of tokens.

    Args:
        x: (B, N, C), the only argument with a gradient.
        weight: (B, N), at least 0; None for `size`.
        size: (B, N); None for 1 each.
        backend: as in `plan`.

    Returns:
        Tokens (B, M, C) in the dtype of x, sizes (B, M) with the same sum as before, and the map (B, N).

    Raises:
        InputError: Shapes that do not agree.
        BackendError: `backend` names a form that cannot run here.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan, as `plan` returns it, got {type(plan).__name__}")
    arguments.check_tensors({"x": x})
    arguments.check_together({"x": x, "the map": plan.map}, weight=weight, size=size)
    shape = tuple(plan.map.shape)
    for name, values in (("x", x), ("weight", weight), ("size", size)):
        if values is not None and tuple(values.shape[:2]) != shape:
            raise InputError(f"{name} must begin with {shape}, as the map, got {tuple(values.shape)}")
    with without_autocast(x):  # autocast would round the weights
        if size is None:
            size = torch.ones(shape, dtype=accumulator(x), device=x.device)
        return *op.pool(x, *plan, size if weight is None else weight, size, backend), plan.map


def unmerge(tokens: torch.Tensor, map: torch.Tensor, parked: torch.Tensor | None = None) -> torch.Tensor:
    """Give each position the token that stands for it: (B, M, C) and (B, N) to (B, N, C).

    Args:
        parked: features of the positions with map -1, (B, N, C) or broadcastable to it; None if no position has -1.
    """
    arguments.check_together({"tokens": tokens, "map": map}, parked=parked)
    if parked is None:
        # Taking rows of a matrix is several times faster than a gather with an index for every channel.
        batch, count, channels = tokens.shape
        first = torch.arange(batch, device=map.device).unsqueeze(1) * count
        taken = tokens.reshape(-1, channels).index_select(0, (map + first).flatten())
        return taken.reshape(-1, map.shape[1], channels)
    return torch.where(map.unsqueeze(-1) < 0, parked, unmerge(tokens, existing(map)))


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The map of two reductions in sequence: `inner` (B, N) first, then `outer` (B, M); -1 stays -1."""
    arguments.check_together({"outer": outer, "inner": inner})
    return torch.where(inner < 0, -1, outer.gather(1, existing(inner)))


def existing(map: torch.Tensor) -> torch.Tensor:
    """The map with 0 instead of -1, a valid index. By `where`, because TensorRT does not clamp integers."""
    return torch.where(map < 0, 0, map)


def prop_bias(size: torch.Tensor | None) -> torch.Tensor | None:
    """log s, to be added to the logits of keys: a token of size s counts as s keys, padding (size 0) as no key."""
    return None if size is None else size.log()

"""Means of the tokens that a plan puts together, and the way back to every position."""

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
    """Each group's weighted mean.

    Args:
        x: (B, N, C), the gradient's only way.
        weight: (B, N), at least 0; None for `size`.
        size: (B, N); None for 1 each.
        backend: as of `plan`.

    Returns:
        Tokens (B, M, C) in the dtype of x, sizes (B, M), which add up to what they did, and the map (B, N).

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
    with without_autocast(x):  # so do weights
        if size is None:
            size = torch.ones(shape, dtype=accumulator(x), device=x.device)
        return *op.pool(x, *plan, size if weight is None else weight, size, backend), plan.map


def unmerge(tokens: torch.Tensor, map: torch.Tensor, parked: torch.Tensor | None = None) -> torch.Tensor:
    """To each position the token that stands for it: (B, M, C) and (B, N) to (B, N, C).

    Args:
        parked: (B, N, C), or what broadcasts to it: what positions get whose map is -1; None where there are none.
    """
    arguments.check_together({"tokens": tokens, "map": map}, parked=parked)
    if parked is None:
        # Rows of one matrix: several times faster than gathering every channel by an index of its own.
        batch, count, channels = tokens.shape
        first = torch.arange(batch, device=map.device).unsqueeze(1) * count
        taken = tokens.reshape(-1, channels).index_select(0, (map + first).flatten())
        return taken.reshape(-1, map.shape[1], channels)
    return torch.where(map.unsqueeze(-1) < 0, parked, unmerge(tokens, existing(map)))


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The map of one reduction after another: `inner` (B, N) first, then `outer` (B, M); -1 stays -1."""
    arguments.check_together({"outer": outer, "inner": inner})
    return torch.where(inner < 0, -1, outer.gather(1, existing(inner)))


def existing(map: torch.Tensor) -> torch.Tensor:
    """Any token in the place of none; TensorRT clamps no integers."""
    return torch.where(map < 0, 0, map)


def prop_bias(size: torch.Tensor | None) -> torch.Tensor | None:
    """log s, added to the logits of keys: a token of size s counts as s keys, padding (size 0) as none."""
    return None if size is None else size.log()

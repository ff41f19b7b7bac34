"""Grouped linear layers: rows sorted by group, and a matrix for each group (the experts of a mixture)."""

import torch

from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.grouped_linear import op

__all__ = ["grouped_linear", "in_groups"]


def in_groups(group: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort rows by group; rows of one group keep their order.

    Args:
        group: (rows,) int64, the group of each row, 0 to groups - 1. The values are not checked.
        groups: the number of groups.

    Returns:
        order: (rows,) int64, the row at each place: `x[order]` is sorted by group.
        offsets: (groups + 1,) int32, where each group begins, and the number of rows; see `grouped_linear`.

    Source: Edge-MoE, arXiv 2305.18691, the queues of tokens in front of the experts.
    """
    arguments.check_together({"group": group})
    groups = arguments.whole(groups, "groups", 1)
    if group.dim() != 1 or group.dtype != torch.int64:
        raise InputError(f"group must be (rows,) int64, got {tuple(group.shape)} of {group.dtype}")
    found, order = torch.sort(group, stable=True)
    offsets = torch.searchsorted(found, torch.arange(groups + 1, device=group.device), out_int32=True)
    return order, offsets


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> None:
    """Raise `InputError` for arguments that the definition does not allow."""
    arguments.check_tensors({"x": x, "weight": weight}, bias=bias)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise InputError(
            f"x must be (rows, in) and weight (groups, out, in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if arguments.any_empty(*weight.shape):
        raise InputError(f"there must be at least 1 group, and 1 channel on each side, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise InputError(f"bias must be (groups, out), {tuple(weight.shape[:2])}, got {tuple(bias.shape)}")
    _check_offsets(offsets, x, len(weight))


def _check_offsets(offsets: torch.Tensor, x: torch.Tensor, groups: int) -> None:
    arguments.check_together({"x": x, "offsets": offsets})
    if offsets.dim() != 1 or len(offsets) != groups + 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"offsets must be ({groups + 1},) whole numbers, got {tuple(offsets.shape)} of {offsets.dtype}"
        )
    # On a GPU they are not checked, since reading them would synchronize.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        found = offsets.tolist()
        if found[0] != 0 or found[-1] != len(x) or found != sorted(found):
            raise InputError(f"offsets must rise from 0 to the {len(x)} rows, got {found}")


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """A linear layer for each group of rows: `x[offsets[e]:offsets[e + 1]] @ weight[e].T + bias[e]`.

    A mixture of experts sorts its pairs of token and expert by expert (`in_groups`). Each expert is then one product,
    and its weights are read once. A group may be empty.

    Args:
        x: (rows, in), sorted by group, any strides.
        weight: (groups, out, in), any strides.
        bias: (groups, out) or None.
        offsets: (groups + 1,) int32 or int64, where each group begins, and the number of rows. Not checked on a GPU.
        backend: "auto", "fused", "portable" or "reference"; see `terrazzo.kernels.use_backend`.

    Returns:
        (rows, out). Under autocast, tensors are rounded as for PyTorch's linear layers.

    Raises:
        InputError: A shape, dtype or offset that the definition does not allow.
        BackendError: `backend` names a form that cannot run here.
    """
    _check(x, weight, bias, offsets)
    tensors = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = {name: t if t.dtype == torch.float64 else t.to(dtype) for name, t in tensors.items()}
    arguments.check_one_dtype(**tensors)
    return op.run(tensors["x"], tensors["weight"], tensors.get("bias"), offsets, backend)

"""Queries of consecutive clips that stand for the same object."""

import torch
import torch.nn.functional as F

from terrazzo.errors import InputError, install_command


def aligned(queries: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The order in which queries of a clip follow the queries of the clip before: `queries[order]` matches `before`.

    Of all assignments, this one has the largest sum of cosines.

    Args:
        queries, before: (Q, C).

    Returns:
        (Q,) of int64, on the device of `queries`.

    Raises:
        InputError: The shapes differ, or a number is NaN or infinite.
        ModuleNotFoundError: SciPy is not installed.

    Source: the authors' `match_from_embds`; first in MinVIS, NeurIPS 2022.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"matching queries needs SciPy: {install_command('openmmlab')}", name="scipy"
        ) from error
    if queries.dim() != 2 or queries.shape != before.shape:
        shapes = f"{tuple(queries.shape)} and {tuple(before.shape)}"
        raise InputError(f"the queries of both clips must have the same shape (Q, C), got {shapes}")
    cosines = (F.normalize(before.float(), dim=1) @ F.normalize(queries.float(), dim=1).T).detach().cpu()
    if not cosines.isfinite().all():
        raise InputError("queries must be finite, got NaN or infinite numbers")
    order = linear_sum_assignment(cosines.numpy(), maximize=True)[1]
    return torch.as_tensor(order, device=queries.device)

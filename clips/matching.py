"""Queries of consecutive clips that stand for the same object."""

import torch
import torch.nn.functional as F


def aligned(queries: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The order in which queries of a clip follow those of the clip before: `queries[order]` matches `before`.

    The assignment has the largest sum of cosines of all.

    Args:
        queries, before: (Q, C).

    Returns:
        (Q,) of int64, on the device of `queries`.

    Source: the authors' `match_from_embds`; first in MinVIS, NeurIPS 2022.
    """
    from scipy.optimize import linear_sum_assignment

    cosines = F.normalize(before.float(), dim=1) @ F.normalize(queries.float(), dim=1).T
    order = linear_sum_assignment(cosines.detach().cpu().numpy(), maximize=True)[1]
    return torch.as_tensor(order, device=queries.device)

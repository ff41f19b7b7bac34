"""Neighborhood attention as an exporter traces it: index tables become constants of the graph."""

import torch
import torch.nn.functional as F

from terrazzo.kernels.neighborhood_attention.tables import Traced, additive, fold, in_order, take, unfold


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention on a map; arguments and result as in `reference.neighborhood_attention`."""
    mode = Traced
    size = tuple(int(side) for side in query.shape[1:3])  # under `torch.jit.trace` sizes are tensors
    folding = mode.folding(size, dilation, query.device)
    groups = []
    for q, k, v, members in zip(*(fold(x, dilation, folding, mode) for x in (query, key, value)), folding.members):
        plan = mode.plan(members, kernel_size, query.device)
        outputs = []
        for call in plan.calls:
            tile_q = take(q, call.queries, call.query_count, mode)
            tile_k = take(k, call.keys, call.key_count, mode)
            tile_v = take(v, call.keys, call.key_count, mode)
            outputs.append(F.scaled_dot_product_attention(tile_q, tile_k, tile_v, additive(rpb, call, q), scale=scale))
        groups.append(in_order(outputs, q, plan, mode))
    return unfold(groups, query.shape, dilation, folding, mode)

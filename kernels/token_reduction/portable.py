"""Token reduction in standard operations on static shapes, for all devices and for exported graphs.

The number of merged tokens is a Python number, so every shape follows from the input's. In exports, ranks are
comparisons and sums, and pooling is a product with a one-hot matrix: there is no sort and no scatter with a reduction.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch import opaque
from terrazzo.kernels.dispatch.dtypes import accumulator
from terrazzo.kernels.dispatch.exporting import is_exporting
from terrazzo.kernels.token_reduction.partition import order, sizes

# The most attention weights of a call that are held at once, and so computed once. A larger call computes a tile of
# weights at a time: on a CPU as many as the caches hold (README.md).
_WHOLE = 1 << 24
_TILE = 1 << 19
# Fewest queries of a tile: every tile reads all keys, and products of matrices with fewer rows wait for them.
_FEWEST = 32


def rank(score: torch.Tensor) -> torch.Tensor:
    """(B, N) to each score's place in descending order, from 0. Among equals, the lowest index comes first."""
    if not is_exporting():
        return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    position = torch.arange(score.shape[-1], device=score.device)
    mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
    before = (other > mine) | ((other == mine) & (position[None, :] < position[:, None]))
    return before.sum(-1)


def running(flags: torch.Tensor) -> torch.Tensor:
    """The running count of set flags, (B, N) to int64. Computed in float32, since TensorRT cannot sum integers."""
    return flags.float().cumsum(1).long()


def _factor(values: torch.Tensor, tau: float) -> torch.Tensor:
    """(1 / values)^(1 / tau), scaled so that the largest of each image is 1; 0 for padding (value 0)."""
    inverse = torch.where(values > 0, 1 / values, 0)
    return (inverse / inverse.amax(-1, keepdim=True)) ** (1 / tau)


def factors(
    size: torch.Tensor | None, importance: torch.Tensor | None, criteria: Sequence[float]
) -> torch.Tensor | None:
    """The factor of each token's attractions by its importance and size, (B, N); None if neither counts."""
    found = None
    for values, tau in ((importance, criteria[1]), (size, criteria[2])):
        if values is not None and tau != 0:
            new = _factor(values, tau)
            found = new if found is None else found * new
    return found


def _attraction(metric: torch.Tensor, factor: torch.Tensor | None, tau: float, sources: int) -> torch.Tensor:
    """(B, sources, destinations): sources come first in `metric` (B, N, D) and `factor` (B, N)."""
    metric = F.normalize(metric, dim=-1)
    weight = metric[:, :sources] @ metric[:, sources:].transpose(1, 2)
    if tau != 0:
        weight = ((weight + 1) / 2).clamp(min=0)
        if tau != 1:
            weight = weight ** (1 / tau)
    else:
        weight = torch.ones_like(weight)
    if factor is not None:
        weight = weight * factor[:, :sources, None] * factor[:, None, sources:]
    return weight


def plan(metric, r, size, importance, protect, criteria, bidirectional, grid) -> torch.Tensor:
    """Maps of all images (B, N); arguments as in `reference.match`, with a batch axis in front."""
    batch, count = metric.shape[:2]
    if r == 0:
        return torch.arange(count, device=metric.device).expand(batch, -1)
    listed, place = order(count - protect, protect, grid, metric.device)
    sources, destinations = sizes(count - protect, protect, grid)
    factor, live = factors(size, importance, criteria), None
    if factor is not None:
        factor = factor[:, protect:].index_select(1, listed)
    if size is not None:
        live = size[:, protect:].index_select(1, listed) > 0
    weight = _attraction(metric[:, protect:].index_select(1, listed), factor, criteria[0], sources)
    if live is not None:
        weight = torch.where(live[:, :sources, None] & live[:, None, sources:], weight, -1)

    best, into = weight.max(2)
    forward = r // 2 if bidirectional else r
    merged = rank(best) < forward
    staying = protect - 1 + running(~merged)  # new place of each source that stays
    if bidirectional:
        # Merged sources receive nothing: -2 is below all attractions, which are at least -1.
        best, back = torch.where(merged.unsqueeze(2), -2, weight).max(1)
        ranks = rank(best)
        behind = protect + sources - r + ranks  # protect + (sources - forward) + (rank - (r - forward))
        of_destinations = torch.where(ranks < r - forward, staying.gather(1, back), behind)
    else:
        behind = torch.arange(destinations, device=metric.device) + (protect + sources - r)
        of_destinations = behind.expand(batch, -1)
    of_sources = torch.where(merged, of_destinations.gather(1, into), staying)
    found = torch.cat([of_sources, of_destinations], 1).index_select(1, place)
    if protect:
        found = torch.cat([torch.arange(protect, device=metric.device).expand(batch, -1), found], 1)
    return found


def add_up(x: torch.Tensor, assignment: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over groups: (B, N) or (B, N, C) to (B, count) or (B, count, C)."""
    if is_exporting():
        groups = torch.arange(count, device=x.device)
        onehot = (assignment.unsqueeze(1) == groups[:, None]).to(x.dtype)  # B M N
        return onehot @ x if x.dim() == 3 else (onehot @ x.unsqueeze(-1)).squeeze(-1)
    batch = x.shape[0]
    first = torch.arange(batch, device=x.device).unsqueeze(1) * count
    out = x.new_zeros(batch * count, *x.shape[2:])
    return out.index_add(0, (assignment + first).flatten(), x.flatten(0, 1)).unflatten(0, (batch, count))


def pool(x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor) -> torch.Tensor:
    """Like `reference.pool`; half precision is summed in float32."""
    dtype = accumulator(x)
    weight = weight.to(dtype)
    total = add_up(weight, assignment, count).gather(1, assignment)
    share = weight / total.clamp(min=torch.finfo(dtype).tiny)
    return add_up(x.to(dtype) * share.unsqueeze(-1), assignment, count).to(x.dtype)


def attention_weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention weights (B, H, queries, N), in float32 at least."""
    score = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(-1, -2)
    if bias is not None:
        score = score + bias[:, None, None]
    return score.softmax(-1, dtype=accumulator(score))


def is_whole(query: torch.Tensor) -> bool:
    """Whether the weights of (B, H, N, D) are computed at once: if they are few, and always in exports."""
    batch, heads, count = query.shape[:3]
    return is_exporting() or batch * heads * count * count <= _WHOLE


def _column_sums(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return attention_weights(query, key, bias).sum((1, 2))


@torch.no_grad()
def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Like `reference.column_mean`."""
    if is_whole(query):
        return attention_weights(query, key, bias).mean((1, 2))
    return by_tiles(_column_sums, query, key, bias)


def by_tiles(column_sums: Callable, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The mean of a tile of weights at a time: some images, or some queries of one image.

    Args:
        column_sums: maps queries, keys and a bias to the sums of weights over heads and queries, (B, N).
    """
    batch, heads, count = query.shape[:3]
    tile = _TILE if query.device.type == "cpu" else _WHOLE
    images = max(1, tile // (heads * count * count))
    rows = max(_FEWEST, tile // (images * heads * count))
    total = torch.zeros(batch, count, dtype=accumulator(query), device=query.device)
    for first in range(0, batch, images):
        here = slice(first, first + images)
        for queries in query[here].split(rows, 2):
            total[here] += column_sums(queries, key[here], None if bias is None else bias[here])
    return total / (heads * count)


def _attend_whole(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return weights.to(value.dtype) @ value


def attend(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention, (B, H, N, D), with a bias (B, N) on the logits of keys, or None."""
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    return opaque.attention("token_reduction", query, key, value, mask)


def attention(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The attention that each key receives on average, and a function from values to the attention's output."""
    if is_whole(query):
        weights = attention_weights(query, key, bias)
        return weights.detach().mean((1, 2)), partial(_attend_whole, weights)
    return column_mean(query, key, bias), partial(attend, query, key, bias)

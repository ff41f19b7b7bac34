"""Token reduction by its definition: one image and token after another, in any floating dtype. It is authoritative.

Source: MCTF, arXiv 2403.10030, section 3; ToMe, arXiv 2210.09461, section 3.
"""

import math

import torch

from terrazzo.kernels.token_reduction.partition import is_destination


def _attraction(metric: torch.Tensor, size, importance, criteria, i: int, j: int) -> float:
    """How strongly tokens i and j of one image attract each other: at least 0, or -1 if i or j is padding."""
    if size is not None and (size[i] == 0 or size[j] == 0):
        return -1.0
    cosine = torch.nn.functional.cosine_similarity(metric[i], metric[j], 0, eps=1e-24).item()
    out = 1.0
    for tau, values in zip(criteria, ((cosine + 1) / 2, importance, size)):
        if values is None or tau == 0:
            continue
        if isinstance(values, torch.Tensor):
            inverse = 1 / values[values > 0]
            values = (1 / values[i] / inverse.max() * (1 / values[j] / inverse.max())).item()
        out *= max(values, 0.0) ** (1 / tau)
    return out


def _best(scores: dict[int, float]) -> tuple[int, float]:
    """The key with the largest value (the lowest key among equals), and the value."""
    key = max(sorted(scores), key=scores.get)
    return key, scores[key]


def match(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: tuple[float, float, float],
    bidirectional: bool,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """The map of one image: (N,) in [0, N - r).

    Args: `metric` (N, D), `size` and `importance` (N,); the rest as in `terrazzo.kernels.token_reduction.plan`, with a
    grid for the partition "cell2x2" and None for "even_odd".
    """
    count = metric.shape[0]
    if r == 0:
        return torch.arange(count)
    target = is_destination(count - protect, protect, grid).tolist()
    sources = [i + protect for i in range(count - protect) if not target[i]]
    destinations = [i + protect for i in range(count - protect) if target[i]]
    weights = {(i, j): _attraction(metric, size, importance, criteria, i, j) for i in sources for j in destinations}
    forward = r // 2 if bidirectional else r

    best = {i: _best({j: weights[i, j] for j in destinations}) for i in sources}
    merged = sorted(best, key=lambda i: (-best[i][1], i))[:forward]
    staying = [i for i in sources if i not in merged]
    back = {j: _best({i: weights[i, j] for i in staying}) for j in destinations} if bidirectional else {}
    order = sorted(destinations, key=lambda j: (-back[j][1], j)) if back else destinations
    gone, order = order[: r - forward], order[r - forward :]

    out = torch.empty(count, dtype=torch.int64)
    for place, token in enumerate([*range(protect), *staying, *order]):
        out[token] = place
    for j in gone:
        out[j] = out[back[j][0]]
    for i in merged:
        out[i] = out[best[i][0]]
    return out


def plan(metric, r, size, importance, protect, criteria, bidirectional, grid) -> torch.Tensor:
    """Maps of all images, (B, N)."""
    if not len(metric):
        return metric.new_empty(metric.shape[:2], dtype=torch.int64)
    per_image = [
        match(
            metric[b],
            r,
            None if size is None else size[b],
            None if importance is None else importance[b],
            protect,
            criteria,
            bidirectional,
            grid,
        )
        for b in range(metric.shape[0])
    ]
    return torch.stack(per_image).to(metric.device)


def pool(x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor) -> torch.Tensor:
    """Weighted means of the tokens (B, N, C) of each group: diag(P w)^-1 P diag(w) x, (B, count, C).

    A group without weight is padding; its mean is 0.
    """
    groups = torch.arange(count, device=x.device)
    onehot = (assignment.unsqueeze(1) == groups[:, None]).to(x.dtype)  # B M N
    weight = weight.to(x.dtype)
    total = onehot @ weight.unsqueeze(-1)
    return (onehot * weight.unsqueeze(1)) @ x / torch.where(total > 0, total, 1)


def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Mean over heads and queries of the attention that each key receives: query and key (B, H, N, D) to (B, N)."""
    score = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        score = score + bias[:, None, None]
    return score.softmax(-1).mean((1, 2))

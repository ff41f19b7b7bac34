"""Strip attention in standard operations: pieces of weights that stay in the caches, forward and backward.

`forward` and `backward` run inside the op, on real tensors.
"""

import math
from collections.abc import Iterator

import torch

# Weights computed at a time: on a CPU as many as the caches hold (README.md), elsewhere few enough for any memory.
_PIECE = 1 << 17
_PIECE_ELSEWHERE = 1 << 25


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, N, heads) or (B, L, heads, D) with images and heads as one axis in front; half precision as float32."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _restored(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_heads_first`: the layout and dtype of `like`."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()


def _pieces(groups: int, queries: int, keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of the groups (images and heads) and of their queries: several whole groups, or queries of one group."""
    size = _PIECE if device.type == "cpu" else _PIECE_ELSEWHERE
    rows = max(1, min(queries, size // keys))
    count = max(1, min(groups, size // (rows * keys))) if rows == queries else 1
    for group in range(0, groups, count):
        for row in range(0, queries, rows):
            yield slice(group, min(group + count, groups)), slice(row, min(row + rows, queries))


class _Weights:
    """The weights of one piece after another, in a shared buffer: fresh memory costs more than a softmax."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor):
        self.query, self.key = query, key
        self.memory: torch.Tensor | None = None

    def __call__(self, group: slice, row: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights (groups, queries, keys), and a free buffer of that shape. The first piece is the largest."""
        query, key = self.query[group, row].unsqueeze(2), self.key[group].unsqueeze(1)
        shape = (*query.shape[:2], key.shape[2])
        if self.memory is None:
            self.memory = query.new_empty(2, math.prod(shape))
        score, weight = (x[: math.prod(shape)].view(shape) for x in self.memory)
        torch.mul(query, key, out=score)
        return torch.softmax(score, -1, out=weight), score


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Strip attention; arguments and result as in `reference.strip_attention`."""
    q, k, v = map(_heads_first, (query, key, value))
    out, weights = q.new_empty(*q.shape, v.shape[2]), _Weights(q, k)
    for group, row in _pieces(*q.shape, k.shape[1], q.device):
        # A piece is contiguous in `out`, so the product is written in place.
        torch.bmm(weights(group, row)[0], v[group], out=out[group, row])
    return _restored(out, query)


def backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to query, key and value. The weights are recomputed; only the inputs are kept."""
    q, k, v, g = map(_heads_first, (query, key, value, grad))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    weights = _Weights(q, k)
    for group, row in _pieces(*q.shape, k.shape[1], q.device):
        part_q, part_g = q[group, row], g[group, row]
        weight, memory = weights(group, row)
        grad_v[group].baddbmm_(weight.transpose(1, 2), part_g)
        grad_weight = torch.bmm(part_g, v[group].transpose(1, 2), out=memory)
        grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
        grad_q[group, row] = torch.bmm(grad_score, k[group].unsqueeze(2)).squeeze(2)
        grad_k[group].add_(torch.bmm(part_q.unsqueeze(1), grad_score).squeeze(1))
    return _restored(grad_q, query), _restored(grad_k, key), _restored(grad_v, value)

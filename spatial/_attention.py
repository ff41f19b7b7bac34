"""Global attention over tokens that several ranks share."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from terrazzo.spatial._part import Part

FEW = 4
"""The most ranks for which all keys and values go to all ranks; more ranks pass them on in a ring."""

QUERIES = 1024
"""How many queries of a block are computed at once in the ring."""


def linear_attention(
    part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float = 0.0
) -> torch.Tensor:
    """phi(q) (sum phi(k)^T v) / (phi(q) sum phi(k) + eps), with features (B, heads, N, F) and values (B, heads, N, D).

    The sums over all ranks' tokens have a size that does not depend on the number of tokens.
    """
    sums = torch.cat([key.transpose(2, 3) @ value, key.sum(2).unsqueeze(3)], 3)
    sums = part.total(sums)
    out = query @ sums
    return out[..., :-1] / (out[..., -1:] + eps)


def attention(
    part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: Sequence[int], scale: float | None
) -> torch.Tensor:
    """Softmax attention of the own queries to all ranks' keys, (B, heads, N, D).

    Args:
        counts: The number of keys of each rank.
        scale: None for D ** -0.5.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if part.group.size > FEW:
        if part.group.shares_modules:
            return ring(part, query, key, value, counts, scale)[0]
        return Ring.apply(query, key, value, part, tuple(counts), scale)
    both = part.joined(torch.cat([key, value], 3), 2, counts)
    key, value = both.split([key.shape[3], value.shape[3]], 3)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _passed(part: Part, counts: Sequence[int], *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Own tensors (B, heads, N, D), then those of the rank before, and so on: all that the ring brings."""
    size, rank = part.group.size, part.rank
    widths = [x.shape[3] for x in tensors]
    held = torch.cat(tensors, 3)
    for step in range(size):
        if step:
            held = part.passed_on(held, 2, counts[(rank - step) % size])
        yield held.split(widths, 3)


def _block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float):
    """Attention to some keys, and the logarithm of each softmax's sum."""
    outs, logs = [], []
    for queries in query.split(QUERIES, 2):
        scores = queries @ key.transpose(2, 3) * scale
        logs.append(scores.logsumexp(3, keepdim=True))
        outs.append((scores - logs[-1]).exp() @ value)
    return torch.cat(outs, 2), torch.cat(logs, 2)


def ring(
    part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in a ring: keys and values travel, partial results are merged. Nothing has all tokens.

    Returns:
        The output, and the logarithm of each softmax's sum.

    Source: Ring Self-Attention, arXiv 2105.13120, in a single ring with merged softmaxes.
    """
    out, log = None, None
    for keys, values in _passed(part, counts, key, value):
        found, sums = _block(query, keys, values, scale)
        if out is None:
            out, log = found, sums
            continue
        both = torch.logaddexp(log, sums)
        out, log = out * (log - both).exp() + found * (sums - both).exp(), both
    return out, log


def ring_gradients(
    part: Part,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log: torch.Tensor,
    counts: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `ring`, in a second ring: keys and values travel again, together with their gradients."""
    size, rank = part.group.size, part.rank
    widths = [x.shape[3] for x in (key, value, key, value)]
    held = torch.cat([key, value, torch.zeros_like(key), torch.zeros_like(value)], 3)
    shift = (grad * out).sum(3, keepdim=True)
    of_query = torch.zeros_like(query)
    for step in range(size):
        keys, values, of_keys, of_values = held.split(widths, 3)
        for i in range(0, query.shape[2], QUERIES):
            some = slice(i, i + QUERIES)
            queries, grads = query[:, :, some], grad[:, :, some]
            weights = (queries @ keys.transpose(2, 3) * scale - log[:, :, some]).exp()
            of_scores = weights * (grads @ values.transpose(2, 3) - shift[:, :, some]) * scale
            of_query[:, :, some] += of_scores @ keys
            of_keys = of_keys + of_scores.transpose(2, 3) @ queries
            of_values = of_values + weights.transpose(2, 3) @ grads
        # After the last step the gradients come home.
        held = part.passed_on(torch.cat([keys, values, of_keys, of_values], 3), 2, counts[(rank - step - 1) % size])
    return of_query, *held.split(widths, 3)[2:]


class Ring(torch.autograd.Function):
    """`ring` that keeps the output alone, and no other rank's keys."""

    @staticmethod
    def forward(ctx, query, key, value, part, counts, scale):
        out, log = ring(part, query, key, value, counts, scale)
        ctx.save_for_backward(query, key, value, out, log)
        ctx.part, ctx.counts, ctx.scale = part, counts, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, log = ctx.saved_tensors
        grads = ring_gradients(ctx.part, grad, query, key, value, out, log, ctx.counts, ctx.scale)
        return *grads, None, None, None

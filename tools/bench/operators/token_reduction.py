"""The operations of an MCTF block beside its layers, and the plain PyTorch that computes them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import use_backend
from terrazzo.kernels.token_reduction import attention, merge, plan, unmerge
from terrazzo.tools.bench.operators.operator import Operator

_PART = 0.35  # of the tokens are merged


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Tokens, and heads of queries, keys and values."""
    batch, count, heads, dim = sizes
    tokens = torch.randn(batch, count, heads * dim, device=device)
    return [tokens, *(torch.randn(batch, count, heads, dim, device=device).transpose(1, 2) for _ in range(3))]


def run(x, query, key, value, backend: str = "auto") -> torch.Tensor:
    """Attention, its mean for each key, the merging of tokens and of their attention outputs, and the way back.

    Tokens are compared by similarity alone: forms round importances differently, and would sometimes choose other
    tokens.
    """
    with use_backend(backend):
        importance, attend = attention(query, key)
        found = plan(x, r=int(x.shape[1] * _PART))
        tokens, _, _ = merge(x, found, importance)
        out, _, _ = merge(attend(value).transpose(1, 2).flatten(2), found, importance)
        return unmerge(tokens + out, found.map)


def plain(x, query, key, value) -> torch.Tensor:
    """The code of a user without the operator: all weights and similarities in memory, a sort, scattered sums."""
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    out = (weights @ value).transpose(1, 2).flatten(2)
    importance = weights.detach().mean((1, 2)).unsqueeze(-1)
    # After the class token, even positions are sources and odd positions are destinations.
    metric = F.normalize(x.detach(), dim=-1)
    best, into = (metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    gone = best.argsort(-1, descending=True)[:, : int(x.shape[1] * _PART)]
    group = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    group = group.scatter(1, 2 * gone + 2, 2 * into.gather(1, gone) + 1).unsqueeze(-1)
    total = torch.zeros_like(importance).scatter_add(1, group, importance).gather(1, group)
    group = group.expand_as(x)
    summed = torch.zeros_like(x).scatter_add(1, group, (x + out) * (importance / total))
    return summed.gather(1, group)


TOKEN_REDUCTION = Operator(
    name="token_reduction",
    run=run,
    peers={"plain": plain},
    compiled={"plain": lambda: torch.compile(plain, dynamic=False)},
    variant="merged and attended",
    axes="B x tokens x heads x dim",
    arguments=("x", "query", "key", "value"),
    inputs=inputs,
    # DeiT-T, -S and -B at 224, and DeiT-S at 384, 512 and 768.
    at_224=((197, 3, 64), (197, 6, 64), (197, 12, 64)),
    larger=((577, 6, 64), (1025, 6, 64), (2305, 6, 64)),
)

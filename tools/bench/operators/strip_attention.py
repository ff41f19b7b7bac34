"""Strip attention, its plain PyTorch form, and dense attention of padded vectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import strip_attention
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Query, key and value."""
    batch, queries, keys, heads, dim = sizes
    shapes = ((batch, queries, heads), (batch, keys, heads), (batch, keys, heads, dim))
    return [torch.randn(shape, device=device) for shape in shapes]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The code of a user without the operator: all weights in memory, heads in front."""
    score = query.transpose(1, 2).unsqueeze(-1) * key.transpose(1, 2).unsqueeze(-2)
    return (score.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Fused dense attention; it needs queries and keys as long as values, so zeros pad them."""
    query, key = (F.pad(x.transpose(1, 2).unsqueeze(-1), (0, value.shape[-1] - 1)) for x in (query, key))
    return F.scaled_dot_product_attention(query, key, value.transpose(1, 2), scale=1.0).transpose(1, 2)


STRIP_ATTENTION = Operator(
    name="strip_attention",
    run=strip_attention,
    peers={"plain": plain, "padded sdpa": padded},
    compiled={"plain": lambda: torch.compile(plain, dynamic=False)},
    variant="one channel",
    axes="B x queries x keys x heads x dim",
    arguments=("query", "key", "value"),
    inputs=inputs,
    # The four stages of S2AFormer-mini at 224, three at 512 and the first at 800 x 1280.
    at_224=((3136, 49, 1, 32), (784, 49, 2, 32), (196, 49, 3, 32), (49, 49, 9, 32)),
    larger=((16384, 256, 1, 32), (4096, 256, 2, 32), (1024, 256, 3, 32), (64000, 1000, 1, 32)),
)

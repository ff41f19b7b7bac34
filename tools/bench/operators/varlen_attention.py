"""Attention within packed sequences, and PyTorch's own ways to compute it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import varlen_attention
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Query, key, value, offsets, and the longest length on the host; other sequences have at least half of it."""
    batch, sequences, longest, heads, dim = sizes
    lengths = [longest - i * 37 % (longest // 2 + 1) for i in range(batch * sequences)]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    packed = torch.randn(sum(lengths), 3, heads, dim, device=device).unbind(1)
    return [*packed, offsets, torch.tensor(longest)]


def run(query, key, value, offsets, longest, backend: str = "auto") -> torch.Tensor:
    return varlen_attention(query, key, value, offsets, int(longest), backend=backend)


def padded(query, key, value, offsets, longest) -> torch.Tensor:
    """Sequences padded to the longest, with a mask of keys."""
    real = torch.arange(int(longest), device=query.device) < offsets.diff().unsqueeze(1)
    query, key, value = (
        x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real[..., None, None], x).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None]).transpose(1, 2)[real]


def jagged(query, key, value, offsets, longest) -> torch.Tensor:
    """PyTorch's nested tensors, which use FlashAttention; in float32 they look for a GPU even on a CPU."""
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(x, offsets.long(), min_seqlen=1, max_seqlen=int(longest)).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).values()


VARLEN_ATTENTION = Operator(
    name="varlen_attention",
    run=run,
    peers={"padded sdpa": padded},
    gpu_peers={"jagged sdpa": jagged},
    compiled={},
    variant="packed",
    axes="B x sequences x longest x heads x dim",
    arguments=("query", "key", "value"),
    inputs=inputs,
    # AS-ViT on DeiT-T and -S at 224, with all tokens and with about half of them, and at 512.
    at_224=((8, 197, 3, 64), (8, 197, 6, 64), (8, 98, 6, 64)),
    larger=((8, 1025, 6, 64), (8, 512, 6, 64)),
)

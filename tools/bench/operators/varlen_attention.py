"""Attention within packed sequences, and PyTorch's own ways to compute it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import varlen_attention
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Query, key, value, cu_seqlens, and max_seqlen on the host; other sequences have at least half of that length."""
    batch, sequences, max_seqlen, heads, dim = sizes
    lengths = [max_seqlen - i * 37 % (max_seqlen // 2 + 1) for i in range(batch * sequences)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    packed = torch.randn(sum(lengths), 3, heads, dim, device=device).unbind(1)
    return [*packed, cu_seqlens, torch.tensor(max_seqlen)]


def run(query, key, value, cu_seqlens, max_seqlen, backend: str = "auto") -> torch.Tensor:
    return varlen_attention(query, key, value, cu_seqlens, int(max_seqlen), backend=backend)


def padded(query, key, value, cu_seqlens, max_seqlen) -> torch.Tensor:
    """Sequences padded to the longest, with a mask of keys."""
    real = torch.arange(int(max_seqlen), device=query.device) < cu_seqlens.diff().unsqueeze(1)
    query, key, value = (
        x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real[..., None, None], x).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None]).transpose(1, 2)[real]


def jagged(query, key, value, cu_seqlens, max_seqlen) -> torch.Tensor:
    """PyTorch's nested tensors, which use FlashAttention; in float32 they look for a GPU even on a CPU."""
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            x, cu_seqlens.long(), min_seqlen=1, max_seqlen=int(max_seqlen)
        ).transpose(1, 2)
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

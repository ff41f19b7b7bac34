"""Block-sparse attention, and PyTorch's own ways to compute it.

Dense attention gives other numbers, so it is no peer here; attention with a mask takes about its time.
"""

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import block_sparse_attention
from terrazzo.tools.bench.operators.operator import Operator

_plans = importlib.import_module("terrazzo.kernels.block_sparse_attention")


def _plan(query: torch.Tensor, index: torch.Tensor):
    tile = query.shape[2] // index.shape[2]
    return _plans.Plan([_plans.Segment("block", index)], tile, tile)


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Query, key and value, an index of random blocks, and the mask of the same pairs for the peers."""
    batch, tokens, heads, dim, tile, listed = sizes
    query, key, value = (torch.randn(batch, heads, tokens, dim, device=device) for _ in range(3))
    index = torch.rand(batch, heads, tokens // tile, tokens // tile, device=device).topk(listed).indices.int()
    return [query, key, value, index, _plans.plan_to_mask(_plan(query, index), query, key)]


def run(query, key, value, index, mask, backend: str = "auto") -> torch.Tensor:
    return block_sparse_attention(query, key, value, _plan(query, index), backend=backend)[0]


def masked(query, key, value, index, mask) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def flex(query, key, value, index, mask) -> torch.Tensor:
    """PyTorch's FlexAttention with the listed blocks, compiled. It has no backward pass on a CPU: its mask is used."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tile = query.shape[2] // index.shape[2]
    count = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32, device=index.device)
    blocks = F.pad(index, (0, index.shape[2] - index.shape[3]))
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count), blocks, count, blocks, tile, lambda b, h, row, column: mask[b, h, row, column]
    )
    if not query.is_cuda:
        mask = block_mask.to_dense().bool().repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        return masked(query, key, value, index, mask)
    return torch.compile(flex_attention, dynamic=False)(query, key, value, block_mask=block_mask)


BLOCK_SPARSE_ATTENTION = Operator(
    name="block_sparse_attention",
    run=run,
    peers={"masked sdpa": masked},
    gpu_peers={"flex attention": flex},
    compiled={},
    variant="random blocks",
    axes="B x tokens x heads x dim x tile x listed blocks",
    arguments=("query", "key", "value"),
    inputs=inputs,
    # A ViT-S on maps of 56 x 56 and 64 x 64, with about 0.16 of all pairs, and with LLSA's tiles of 4 x 4.
    at_224=((3136, 6, 64, 64, 8),),
    larger=((4096, 6, 64, 64, 10), (4096, 6, 64, 16, 8)),
)

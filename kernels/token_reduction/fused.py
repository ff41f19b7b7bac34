"""Token reduction in Triton: which calls can run, how a call is cut into blocks, and the launches.

The kernels are in fused_match.py, fused_pool.py and fused_columns.py, which import triton; this file does so at the
first launch. Every launch is decided by shapes and types alone, and nothing is added up by atomics, so the same call
gives the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from terrazzo.kernels.token_reduction.partition import sizes
from terrazzo.kernels.token_reduction.portable import factors
from terrazzo.kernels.triton_host import blocks as shared
from terrazzo.kernels.triton_host.machine import block_of, interpreted, on_device, precision

# Tokens of a program that counts, and groups or tokens of a program that pools or spreads.
_COUNTED = 64
_POOLED = 16


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut and compiled: rows of a program, rows and channels that it reads at a time, warps, stages."""

    own: int
    other: int
    channels: int
    warps: int
    stages: int


def match_blocks(itemsize: int) -> Blocks:
    """Found by compiling for compute capabilities 8.0, 9.0 and 10.0 and for gfx942 (README.md), not by timing."""
    return Blocks(64, 64, 32, 4, 3) if itemsize == 2 else Blocks(32, 32, 32, 4, 2)


def column_blocks(itemsize: int, head_dim: int) -> shared.Blocks:
    """Blocks of `row_sums` and `column_sums`, found like `match_blocks`."""
    if itemsize == 2:
        return shared.Blocks(64, 64, 4, 2)
    return shared.Blocks(32, 32, 4 if head_dim <= 64 else 8, 2)


def block_c(channels: int) -> int:
    """Channels of a program that pools or spreads."""
    return min(128, block_of(channels))


def _tiles(count: int, block: int) -> int:
    return -(-count // block)


def plan(
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None,
    importance: torch.Tensor | None,
    protect: int,
    criteria: Sequence[float],
    bidirectional: bool,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """Maps of all images, (B, N); arguments as in `portable.plan`, except that `metric` may be in half precision."""
    from terrazzo.kernels.token_reduction import fused_match

    batch, count, width = metric.shape
    metric, device = metric.contiguous(), metric.device
    sources, targets = sizes(count - protect, protect, grid)
    forward = r // 2 if bidirectional else r
    # The norm of a long float16 vector may overflow float16.
    norm = torch.linalg.vector_norm(metric, dim=-1, dtype=torch.float32)
    factor = factors(size, importance, criteria)
    if size is not None:
        factor = torch.where(size > 0, torch.ones_like(size) if factor is None else factor, -1)
    tau, cut = criteria[0], match_blocks(metric.dtype.itemsize)
    place = (protect, *(grid or (1, 1)), forward)
    found = torch.empty(batch, count, dtype=torch.int64, device=device)
    if found.numel() == 0:
        return found

    def match(owners: int, rank: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks of the best attractions, and the best partners; of the destinations if the sources' `rank` is given."""
        best = torch.empty(batch, owners, dtype=torch.float32, device=device)
        into, ranks = (torch.empty(batch, owners, dtype=torch.int32, device=device) for _ in range(2))
        tiles = _tiles(owners, cut.own)
        fused_match.match[(batch * tiles,)](
            metric,
            norm,
            norm if factor is None else factor.contiguous(),
            into if rank is None else rank,
            best,
            into,
            count,
            sources,
            targets,
            *place,
            tiles,
            1 / tau if tau else 1.0,
            DIM=width,
            BLOCK_D=cut.channels,
            BLOCK=cut.own,
            BLOCK_OTHER=cut.other,
            CELLS=grid is not None,
            POWER=0 if tau == 0 else 1 if tau == 1 else 2,
            HAS_FACTOR=factor is not None,
            BACKWARD=rank is not None,
            PRECISION=precision(metric.dtype),
            INTERPRETED=interpreted(fused_match.match),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        tiles = _tiles(owners, _COUNTED)
        fused_match.ranks[(batch * tiles,)](best, ranks, owners, tiles, BLOCK=_COUNTED)
        return ranks, into

    with on_device(device):
        rank, into = match(sources, None)
        back_rank, back = match(targets, rank) if bidirectional else (rank, into)
        tiles = _tiles(count, _COUNTED)
        fused_match.assign[(batch * tiles,)](
            rank,
            into,
            back_rank,
            back,
            found,
            count,
            sources,
            targets,
            *place,
            r,
            tiles,
            BLOCK=_COUNTED,
            CELLS=grid is not None,
            BACKWARD=bidirectional,
        )
    return found


def pool(
    x: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor, size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted means of groups, like `portable.pool`.

    Args:
        weight, size: (B, N) float32.

    Returns:
        The means (B, count, C) in the dtype of x, the sums of sizes and the sums of weights, (B, count) float32.
    """
    from terrazzo.kernels.token_reduction import fused_pool

    x, assignment, weight, size = (tensor.contiguous() for tensor in (x, assignment, weight, size))
    batch, tokens, channels = x.shape
    out = x.new_empty(batch, count, channels)
    sizes_, total = (torch.empty(batch, count, dtype=torch.float32, device=x.device) for _ in range(2))
    order = torch.empty(batch, tokens, dtype=torch.int32, device=x.device)
    begin = torch.empty(batch, count + 1, dtype=torch.int32, device=x.device)
    if out.numel() == 0:
        return out, sizes_.zero_(), total.zero_()
    with on_device(x.device):
        tiles = _tiles(tokens + count + 1, _COUNTED)
        fused_pool.sort[(batch * tiles,)](assignment, order, begin, tokens, count, tiles, BLOCK=_COUNTED)
        tiles, wide = _tiles(count, _POOLED), block_c(channels)
        fused_pool.pool[(batch * tiles, _tiles(channels, wide))](
            x,
            weight,
            size,
            order,
            begin,
            out,
            total,
            sizes_,
            tokens,
            count,
            tiles,
            CHANNELS=channels,
            BLOCK=_POOLED,
            BLOCK_C=wide,
        )
    return out, sizes_, total


def pool_backward(
    grad: torch.Tensor, assignment: torch.Tensor, weight: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, given the gradient of the means and the sums of weights."""
    from terrazzo.kernels.token_reduction import fused_pool

    grad, assignment, weight = grad.contiguous(), assignment.contiguous(), weight.contiguous()
    batch, groups, channels = grad.shape
    tokens = assignment.shape[1]
    out = grad.new_empty(batch, tokens, channels)
    if out.numel() == 0:
        return out
    tiles, wide = _tiles(tokens, _POOLED), block_c(channels)
    with on_device(grad.device):
        fused_pool.spread[(batch * tiles, _tiles(channels, wide))](
            grad,
            assignment,
            weight,
            total,
            out,
            tokens,
            groups,
            tiles,
            CHANNELS=channels,
            BLOCK=_POOLED,
            BLOCK_C=wide,
        )
    return out


def column_mean(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Like `portable.column_mean`, in float32; queries and keys are read in place if their channels are contiguous."""
    from terrazzo.kernels.token_reduction import fused_columns

    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    batch, heads, count, head_dim = query.shape
    lse, total = (torch.empty(batch, heads, count, dtype=torch.float32, device=query.device) for _ in range(2))
    if total.numel() == 0:
        return total.sum(1)
    cut = column_blocks(query.dtype.itemsize, head_dim)
    constants = cut.constants(fused_columns.row_sums, head_dim, query.dtype) | dict(HAS_BIAS=bias is not None)
    tensors = (query, key, lse if bias is None else bias.float().contiguous(), lse)
    strides = (*query.stride()[:3], *key.stride()[:3])
    scale = 1 / math.sqrt(head_dim)
    with on_device(query.device):
        tiles = _tiles(count, cut.queries)
        fused_columns.row_sums[(batch * heads * tiles,)](*tensors, scale, heads, count, tiles, *strides, **constants)
        tiles = _tiles(count, cut.keys)
        fused_columns.column_sums[(batch * heads * tiles,)](
            *tensors, total, scale, heads, count, tiles, *strides, **constants
        )
    return total.sum(1) / (heads * count)

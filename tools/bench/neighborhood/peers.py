"""Neighborhood attention as users of other libraries have it: dense attention with a mask, FlexAttention, NATTEN.

All take query, key and value as (B, H, W, heads, D), and return the same shape.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from terrazzo.kernels.neighborhood_attention.reference import axis_neighbors

# For one axis: are these keys within the windows of these queries, and where in the bias table?
_Axis = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Window:
    """A map and the window that slides over it, per axis."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]


def _merged(x: torch.Tensor) -> torch.Tensor:
    """(B, H, W, heads, D) -> (B, heads, H * W, D), a view."""
    return x.flatten(1, 2).transpose(1, 2)


def dense_mask(rpb: torch.Tensor, window: Window, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: the bias within windows, -inf elsewhere; (heads, tokens, tokens)."""
    (rows, row_offsets), (columns, column_offsets) = (
        axis_neighbors(*axis, rpb.device) for axis in zip(window.size, window.kernel, window.dilation)
    )
    keys = (rows[:, None, :, None] * window.size[1] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    width = 2 * window.kernel[1] - 1
    offsets = (row_offsets[:, None, :, None] * width + column_offsets[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = torch.full((len(rpb), window.tokens, window.tokens), float("-inf"), dtype=dtype, device=rpb.device)
    return mask.scatter(2, keys.expand(len(rpb), -1, -1), rpb.flatten(1)[:, offsets].to(dtype))


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One dense attention with the result of `dense_mask`."""
    out = F.scaled_dot_product_attention(*map(_merged, (query, key, value)), mask)
    return out.transpose(1, 2).reshape(query.shape)


def _axis(length: int, kernel: int, dilation: int) -> _Axis:
    """The definition along one axis, in arithmetic that FlexAttention can compile into its kernels."""

    def inside(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residue, member = query % dilation, query // dilation
        members = (length - residue + dilation - 1) // dilation
        start = torch.minimum((member - kernel // 2).clamp(min=0), members - kernel)
        other = key // dilation
        within = (key % dilation == residue) & (other >= start) & (other < start + kernel)
        # FlexAttention also reads the bias outside the window, before it masks.
        return within, (other - member + kernel - 1).clamp(0, 2 * kernel - 2)

    return inside


def flex_mask(window: Window) -> Callable[..., torch.Tensor]:
    """FlexAttention's `mask_mod`: windows that move inward at borders, residue classes, maps that are not square."""
    rows, columns = (_axis(*axis) for axis in zip(window.size, window.kernel, window.dilation))
    width = window.size[1]

    def mask_mod(batch, head, query, key):
        return rows(query // width, key // width)[0] & columns(query % width, key % width)[0]

    return mask_mod


def flex_bias(window: Window, rpb: torch.Tensor) -> Callable[..., torch.Tensor]:
    """FlexAttention's `score_mod`, which adds the bias; its gradient flows to `rpb`."""
    rows, columns = (_axis(*axis) for axis in zip(window.size, window.kernel, window.dilation))
    width = window.size[1]

    def score_mod(score, batch, head, query, key):
        return score + rpb[head, rows(query // width, key // width)[1], columns(query % width, key % width)[1]]

    return score_mod


def flex_blocks(window: Window, device: torch.device, block: int = 128):
    """FlexAttention's `BlockMask`, from the windows themselves.

    `create_block_mask` looks at every pair of tokens, and a map of 800 x 1200 has 10^12 pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (rows, _), (columns, _) = (
        axis_neighbors(*axis, device) for axis in zip(window.size, window.kernel, window.dilation)
    )
    count = -(-window.tokens // block)
    queries = torch.arange(window.tokens, device=device).view(*window.size, 1) // block
    visited = torch.zeros(count, count, dtype=torch.bool, device=device)
    for row in rows.unbind(1):
        keys = (row[:, None, None] * window.size[1] + columns) // block
        visited[queries.expand_as(keys), keys] = True
    order = visited.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        visited.sum(1, dtype=torch.int32)[None, None],
        order.to(torch.int32)[None, None],
        BLOCK_SIZE=block,
        mask_mod=flex_mask(window),
        seq_lengths=(window.tokens, window.tokens),
    )


def flex(query, key, value, attend: Callable, blocks, score_mod: Callable | None) -> torch.Tensor:
    """FlexAttention; `attend` is `flex_attention`, plain or compiled."""
    out = attend(*map(_merged, (query, key, value)), score_mod=score_mod, block_mask=blocks)
    return out.transpose(1, 2).reshape(query.shape)


NATTEN = ("hopper-fna", "blackwell-fna", "cutlass-fna", "flex-fna")
"""The backends of NATTEN; each is for some GPUs. The last is FlexAttention."""


def natten(query, key, value, window: Window, backend: str) -> torch.Tensor:
    """NATTEN 0.20 or later, which has no bias."""
    attend = importlib.import_module("natten").na2d
    # Without compilation, FlexAttention holds all pairs of tokens.
    return attend(
        query,
        key,
        value,
        kernel_size=window.kernel,
        dilation=window.dilation,
        backend=backend,
        torch_compile=backend == "flex-fna",
    )

"""Neighborhood attention: every patch attends to the nearest patches and to the tokens in front.

Papers: Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; Dilated Neighborhood Attention Transformer,
arXiv 2209.15001.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.neighborhood_attention import neighborhood_attention

# Patches along a tile's edge. A class of up to twice as many is one tile.
_TILE = 8


class NeighborhoodAttention(Mixer):
    """out = softmax(s q k^T) v over the `kernel` x `kernel` nearest patches and the tokens in front.

    Near a border the window is shifted inward, as in `terrazzo.kernels.neighborhood_attention`. The cost is
    2 N kernel^2 D instead of 2 N^2 D. If `kernel` reaches both sides of the map, this is softmax attention.

    Ours: tokens in front are keys of every patch, in the same softmax, and attend to all tokens. A side shorter than
    `kernel` has a window of the whole side, and a side shorter than `kernel` x `dilation` has the largest dilation that
    fits. Without tokens in front the zoo's operator computes windows. With tokens in front, tiles of queries attend to
    the keys of all their windows by PyTorch's attention with a mask, because the operator does not return the sums with
    which its result could be merged.

    Args:
        kernel: Edge of the window in patches, at least 2.
        dilation: Step between a window's patches.
        bias: Whether to learn a relative position bias for each head, zero at the start, as NAT has.

    Source: arXiv 2204.07143, section 3.1; arXiv 2209.15001, section 3.
    """

    open_sizes = False

    def __init__(
        self,
        host: Host,
        kernel: int = 7,
        dilation: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        self.kernel = arguments.whole(kernel, "kernel", 2)
        self.dilation = arguments.whole(dilation, "dilation", 1)
        edge = 2 * self.kernel - 1
        self.rpb = nn.Parameter(torch.zeros(host.heads, edge, edge, device=device, dtype=dtype)) if bias else None

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        if self.rpb is None and self.kernel >= max(grid):
            return f"windows of {self.kernel} reach both sides of the map"
        return None

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        kernel, dilation, bias = self._windows(query, place)
        if place.prefix == 0 and min(kernel) > 1:
            maps = (x.transpose(1, 2).unflatten(1, place.grid) for x in (query, key, value))  # B H W heads D
            return neighborhood_attention(*maps, kernel, dilation, bias).flatten(1, 2).transpose(1, 2)
        return self._with_front(query, key, value, place)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        own = torch.eye(query.shape[2], dtype=query.dtype, device=query.device)
        return self._with_front(query, key, own.expand(*query.shape[:2], -1, -1), place)

    def _windows(
        self, query: torch.Tensor, place: Place
    ) -> tuple[tuple[int, int], tuple[int, int], torch.Tensor | None]:
        """Sides and dilation of windows on a map, and the bias for these windows."""
        kernel = tuple(min(self.kernel, side) for side in place.grid)
        dilation = tuple(min(self.dilation, side // edge) for side, edge in zip(place.grid, kernel))
        if self.rpb is None:
            return kernel, dilation, None
        # A shorter window has the middle of the table.
        rows, columns = (slice(self.kernel - edge, self.kernel - 1 + edge) for edge in kernel)
        return kernel, dilation, self.rpb[:, rows, columns].to(query.dtype)

    def _with_front(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Mix patches and tokens in front by PyTorch's attention; values (B, heads, N, E) may have any channels."""
        kernel, dilation, bias = self._windows(query, place)
        axes = [_Axis(*given, query.device) for given in zip(place.grid, kernel, dilation)]
        return torch.cat(
            [
                F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value),
                _tiles(query, key, value, place, axes, bias),
            ],
            2,
        )


class _Axis:
    """Where the queries of an axis' tiles stand, and which keys they need.

    Residue classes of a dilated axis are cut into tiles separately, into as many tiles each.

    Attributes:
        queries, keys: (tiles, tile), (tiles, keys of a tile), positions; a position may repeat to fill a tile.
        inside: (tiles, tile, keys of a tile), whether a key is in a query's window.
        offset: The same shape, key minus query in steps of the dilation, plus kernel - 1; any where not inside.
        order: (length,), where each position's query is in the tiles.
    """

    def __init__(self, length: int, kernel: int, dilation: int, device: torch.device):
        longest = -(-length // dilation)
        tile = longest if longest <= 2 * _TILE else _TILE
        count = -(-longest // tile)
        residue = torch.arange(dilation, device=device)[:, None]
        members = (length - residue + dilation - 1) // dilation
        query = torch.arange(count * tile, device=device).minimum(members - 1)  # classes, queries of a class
        start = (query - kernel // 2).clamp(min=0).minimum(members - kernel)
        query, start = (x.unflatten(1, (count, tile)).flatten(0, 1) for x in (query, start))
        member = start[:, :1] + torch.arange(min(tile + kernel - 1, longest), device=device)
        residue, members = (x.repeat_interleave(count, 0) for x in (residue, members))
        self.queries = query * dilation + residue
        self.keys = member.minimum(members - 1) * dilation + residue
        behind = member[:, None] - start[:, :, None]
        self.inside = (behind >= 0) & (behind < kernel)
        self.offset = (member[:, None] - query[:, :, None] + kernel - 1).clamp(0, 2 * kernel - 2)
        position = torch.arange(length, device=device)
        self.order = position % dilation * (count * tile) + position // dilation


def _pairs(rows: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """All pairs of two axes' tiles (T, M), (U, N) as flat positions (T U, M N) of a map of a width."""
    return (rows[:, None, :, None] * width + columns[:, None, :]).flatten(2).flatten(0, 1)


def _tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    place: Place,
    axes: list[_Axis],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The patches' results (B, heads, H W, D): each tile's queries attend to its keys and the tokens in front."""
    prefix, (rows, columns) = place.prefix, axes
    queries = prefix + _pairs(rows.queries, columns.queries, place.grid[1])
    keys = prefix + _pairs(rows.keys, columns.keys, place.grid[1])
    keys = torch.cat([torch.arange(prefix, device=keys.device).expand(len(keys), -1), keys], 1)
    inside = (rows.inside[:, None, :, None, :, None] & columns.inside[:, None, :, None, :]).flatten(4).flatten(2, 3)
    mask = query.new_zeros(inside.flatten(0, 1).shape).masked_fill(~inside.flatten(0, 1), -math.inf)  # tiles M N
    if bias is not None:
        edge = bias.shape[2]
        at = rows.offset[:, None, :, None, :, None] * edge + columns.offset[:, None, :, None, :]
        mask = mask + bias.flatten(1)[:, at.flatten(4).flatten(2, 3).flatten(0, 1)]  # heads tiles M N
    mask = F.pad(mask, (prefix, 0))
    q, k, v = (_taken(x, at) for x, at in ((query, queries), (key, keys), (value, keys)))
    # PyTorch's attention without N x N weights takes masks with as many axes as queries.
    mask = mask[None] if bias is None else mask.expand(query.shape[0], -1, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    tile = rows.queries.shape[1], columns.queries.shape[1]
    out = out.unflatten(2, tile).unflatten(1, (len(rows.queries), len(columns.queries)))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # B*heads, rows of all tiles, columns of all tiles, D
    out = out.index_select(1, rows.order).index_select(2, columns.order)
    return out.flatten(1, 2).unflatten(0, query.shape[:2])


def _taken(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Tokens (B, heads, N, D) at places (tiles, M): (B * heads, tiles, M, D)."""
    return x.flatten(0, 1)[:, at]

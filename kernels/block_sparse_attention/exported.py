"""Attention by a plan as an exporter traces it: all lists are gathered at once, then one softmax over all segments."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels.block_sparse_attention.lowering import Keys
from terrazzo.kernels.dispatch.dtypes import accumulator


def _in_blocks(x: torch.Tensor, tile: int, value: float = 0.0) -> torch.Tensor:
    """(B, H, N, D) to (B, H, blocks, tile, D); the last block is filled with `value`."""
    pad = -x.shape[2] % tile
    if pad:
        x = F.pad(x, (0, 0, 0, pad), value=value)
    return x.unflatten(2, (-1, tile))


def _gathered(blocks: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Blocks (B, H, blocks, tile, D) by their numbers among all blocks, (B, H, tiles, L): (B, H, tiles, L tile, D)."""
    found = blocks.flatten(0, 2).index_select(0, place.flatten())
    return found.reshape(*place.shape[:3], -1, blocks.shape[-1])


def forward(
    query: torch.Tensor, segments: Sequence[Keys], query_tile: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the queries of all slots, (B, H, slots, D), to all segments: out (B, H, slots, Dv) and lse.

    Memory: the gathered keys and values, and the logits, of all tiles.
    """
    batch, heads, slots, _ = query.shape
    rows = _in_blocks(query * scale, query_tile)  # B H tiles query_tile D
    logits, values = [], []
    for key, value, index, bias, tile, shift in segments:
        if index is None:
            key, value = key.unsqueeze(2), value.unsqueeze(2)
            bias = None if bias is None else bias[:, :, None, None]
        else:
            keys = key.shape[2]
            index = index.expand(batch, heads, -1, -1).long()
            head = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1)
            place = index.clamp(min=0) + head * ((keys + tile - 1) // tile)
            key, value = (_gathered(_in_blocks(x, tile), place) for x in (key, value))
            real = (index >= 0).repeat_interleave(tile, -1) if tile > 1 else index >= 0
            column = query.new_zeros(1, 1, keys) if bias is None else bias
            column = column.expand(batch, heads, -1).unsqueeze(-1)
            column = _gathered(_in_blocks(column, tile, -torch.inf), place).squeeze(-1)
            bias = torch.where(real, column, -torch.inf).unsqueeze(3)
        logit = rows @ key.transpose(-1, -2) + shift  # B H tiles query_tile K
        logits.append(logit if bias is None else logit + bias)
        values.append(value)
    logit = torch.cat(logits, -1)
    # Rows without keys: a softmax of zeros, and its result is replaced by 0.
    empty = logit.amax(-1, keepdim=True) == -torch.inf
    logit = torch.where(empty, 0, logit)
    weights = torch.where(empty, 0, logit.softmax(-1)).to(query.dtype).split([x.shape[-1] for x in logits], -1)
    out = sum(weight @ value for weight, value in zip(weights, values))
    lse = torch.where(empty.squeeze(-1), -torch.inf, logit.to(accumulator(query)).logsumexp(-1))
    return out.flatten(2, 3)[:, :, :slots], lse.flatten(2, 3)[:, :, :slots]

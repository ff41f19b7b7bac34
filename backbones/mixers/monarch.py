"""Monarch attention: the attention matrix is a product of one factor along rows and one along columns.

Papers: MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured Attention, arXiv 2505.18698;
MonarchRT: Efficient Attention for Real-Time Video Generation, arXiv 2602.12271.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.backbones.mixers._tiling import Tiling
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments

# The guard of the factor 1 / c in the authors' code, for more than one step.
_SMALL, _LARGEST = 1e-6, 1e4
# Numbers alive at once in the largest tensors of a part.
_PART = 1 << 22


class Monarch(Mixer):
    """A query (i, j) weighs the key (k, l) with L[j, i, k] R[k, j, l]: rows k by L, and positions l of a row by R.

    Each R[k, j, :] and each L[j, i, :] is a distribution. They begin at L = 1 and alternate `steps` times, each to the
    maximum of the sum of expected logits and entropies. With s = D^(-1/2) and u = s q at the first step:

        R[k, j] = softmax(u[k, j] k[k, :]), m[k, j] = R[k, j] k[k, :], h[k, j] = entropy of R[k, j]
        L[j, i] = softmax(s q[i, j] m[:, j] + h[:, j])
        u[k, j] = s sum_i L[j, i, k] q[i, j] / sum_i L[j, i, k], for the next step

    On a map of one row or one column, and where keys are equal along each row, this is softmax attention. The cost is
    N (3 W + 2 H) D for a step instead of 2 N^2 D.

    With several tiles, each pair of a tile of queries and a tile of keys has a factor R, and L weighs the rows of all
    tiles of keys. Tiles of one column are softmax attention. With h x w tiles the cost is N (3 h W + 2 w H) D.

    For `steps` > 1 the factor 1 / sum_i L is guarded as in the authors' code, in the first step too. Ours: tokens in
    front are further entries of L, so their weights are exact, and they attend to all tokens; tiles at the border may
    be cut short.

    Args:
        steps: Number of alternations.
        tiles: Rows and columns of tiles, (1, 1) as published. More tiles come closer to softmax attention.

    Source: arXiv 2505.18698; arXiv 2602.12271 for tiles and the guard.
    """

    def __init__(
        self,
        host: Host,
        steps: int = 1,
        tiles: Any = (1, 1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        self.steps = arguments.whole(steps, "steps", 1)
        self.tiles = wholes("tiles", tiles)
        if len(self.tiles) != 2 or min(self.tiles) < 1:
            raise InputError(f"tiles must be 2 numbers of at least 1, the rows and columns of tiles, got {tiles!r}")

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        tiling = Tiling(place.grid, tuple(-(-side // count) for side, count in zip(place.grid, self.tiles)))
        q, k, v = (tiling.cut(x[:, :, place.prefix :]).unflatten(3, tiling.tile) for x in (query, key, value))
        asked = q.transpose(3, 4).flatten(2, 3)  # B heads columns-of-all-tiles H D
        k, v = (x.transpose(2, 3).contiguous() for x in (k, v))  # B heads H tiles W D
        fronts = key[:, :, : place.prefix], value[:, :, : place.prefix]
        absent = None if tiling.full else tiling.absent(query.device).unflatten(1, tiling.tile)
        batch, heads, columns, rows, dim = asked.shape
        size = batch * heads * rows * tiling.count * max(tiling.tile[1], dim)
        pieces = asked.tensor_split(-(-columns * size // _PART), 2) if size else (asked,)
        done, parts = 0, []
        for piece in pieces:
            parts.append(self._columns(piece, k, v, fronts, absent, done))
            done += piece.shape[2]
        out = torch.cat(parts, 2).unflatten(2, (tiling.count, -1)).transpose(3, 4).flatten(3, 4)
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        return torch.cat([front, tiling.joined(out)], 2)

    def _columns(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        fronts: tuple[torch.Tensor, torch.Tensor],
        absent: torch.Tensor | None,
        first: int,
    ) -> torch.Tensor:
        """The results of columns of queries (B, heads, columns, H, D), which do not depend on other columns.

        Args:
            key, value: (B, heads, H, tiles, W, D).
            fronts: Keys and values of the tokens in front (B, heads, P, D).
            absent: (tiles, H, W), True where a tile has no token; None if tiles are full.
            first: Number of the first column among the columns of all tiles.
        """
        prefix, tiles, columns = fronts[0].shape[2], key.shape[3], query.shape[2]
        scale = query.shape[-1] ** -0.5
        probe = (query * scale).transpose(2, 3).unsqueeze(3)  # B heads H 1 columns D
        if self.steps > 1:
            probe = probe * _reciprocal(query.new_ones(()))
        for step in range(self.steps):
            weight, mean, entropy = _along_rows(probe, key, absent)
            # Entries of L: B heads columns (tiles H)
            keys = torch.cat([_each(fronts[0], columns), _entries(mean)], 3)
            bias = F.pad(_entries(entropy.unsqueeze(5)).squeeze(4), (prefix, 0)).unsqueeze(3).to(query.dtype)
            if step + 1 < self.steps:
                left = ((query * scale) @ keys.transpose(3, 4) + bias).softmax(-1)[..., prefix:]
                if absent is not None:  # queries that are not there have no part in the next step
                    at = torch.arange(first, first + columns, device=query.device)
                    left = left * ~absent.transpose(1, 2).flatten(0, 1)[at, :, None]
                total = left.sum(3).unsqueeze(4)
                probe = left.transpose(3, 4) @ (query * scale) * _reciprocal(total)
                probe = probe.unflatten(3, (tiles, -1)).permute(0, 1, 4, 3, 2, 5)  # B heads H tiles columns D
        values = torch.cat([_each(fronts[1], columns), _entries(weight @ value)], 3)
        q, k, v, bias = (x.flatten(0, 1) for x in (query, keys, values, bias))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(0, query.shape[:2])


def _along_rows(
    probe: torch.Tensor, key: torch.Tensor, absent: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R (B, heads, H, tiles, columns, W) for keys (B, heads, H, tiles, W, D), its mean key and its entropy."""
    logits = probe @ key.transpose(-1, -2)
    if absent is not None:
        logits = logits.masked_fill(absent[:, 0].unsqueeze(1), -math.inf)
    total = logits.logsumexp(-1, keepdim=True)
    weight = logits.softmax(-1).to(key.dtype)
    mean = weight @ key
    entropy = total.squeeze(-1) - (probe * mean).sum(-1)
    if absent is not None:
        entropy = entropy.masked_fill(absent[:, :, 0].transpose(0, 1).unsqueeze(2), -math.inf)
    return weight, mean, entropy


def _entries(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, H, tiles, columns, D) to (B, heads, columns, tiles H, D)."""
    return x.permute(0, 1, 4, 3, 2, 5).flatten(3, 4)


def _each(x: torch.Tensor, columns: int) -> torch.Tensor:
    """(B, heads, P, D) for each column: (B, heads, columns, P, D)."""
    return x.unsqueeze(2).expand(-1, -1, columns, -1, -1)


def _reciprocal(total: torch.Tensor) -> torch.Tensor:
    return (total + _SMALL).reciprocal().clamp(max=_LARGEST)

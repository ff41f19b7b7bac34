"""Attention by a plan in standard operations: tiles are gathered in pieces that stay in the caches.

`forward` and `backward` run inside the op, on real tensors, for one segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast

# Logits computed at a time: on a CPU as many as the caches hold (README.md), elsewhere few enough for any memory.
_PIECE = 1 << 17
_PIECE_ELSEWHERE = 1 << 25


def _blocks(x: torch.Tensor, tile: int, value: float = 0.0) -> torch.Tensor:
    """(B, H, N, ...) to (B H blocks, tile, ...); the last block of each head is filled with `value`."""
    pad = -x.shape[2] % tile
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad), value=value)
    return x.reshape(-1, tile, *x.shape[3:])


def _rows(blocks: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The inverse of `_blocks`: the batch, heads and rows of `like`, in its dtype or another."""
    batch, heads, rows = like.shape[:3]
    x = blocks.reshape(batch, heads, -1, *blocks.shape[2:])[:, :, :rows]
    return x.to(like.dtype if dtype is None else dtype).contiguous()


@dataclass(frozen=True)
class _Piece:
    """Some tiles of queries.

    Attributes:
        tiles: which, a slice of all tiles, or their numbers if lists have different lengths.
        rows: which queries of each tile; all, unless one tile is larger than a piece.
        place: (tiles, L) the numbers of their blocks among the blocks of all images and heads; None: the tile's own.
        hidden: (tiles, L, 1) where a list has no entry; None if the lists of the piece are full.
    """

    tiles: slice | torch.Tensor
    rows: slice
    place: torch.Tensor | None
    hidden: torch.Tensor | None


class _Call:
    """One call: tensors in tiles and blocks, and the pieces in which they are computed."""

    def __init__(self, query, key, value, index, bias, query_tile: int, key_tile: int):
        self.dtype = accumulator(query)
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        if index is None:
            key_tile = keys
        # One list for all queries of a head is one tile, as is attention to all keys.
        self.query_tile = queries if index is None or index.shape[2] == 1 else query_tile
        self.key_tile = key_tile
        self.key, self.value = _blocks(key, key_tile), _blocks(value, key_tile)
        self.bias = None
        if bias is not None or keys % key_tile:
            bias = query.new_zeros(1, 1, keys, dtype=self.dtype) if bias is None else bias.to(self.dtype)
            self.bias = _blocks(bias.expand(batch, heads, keys), key_tile, -torch.inf)
        self.place = self.hidden = None
        if index is not None:
            index = index.expand(batch, heads, -1, -1)
            first = torch.arange(batch * heads, device=index.device) * (len(self.key) // (batch * heads))
            self.place = (index.clamp(min=0) + first.view(batch, heads, 1, 1)).flatten(0, 2)
            hidden = (index < 0).flatten(0, 2).unsqueeze(-1)
            if query.device.type != "cpu" or hidden.any():  # elsewhere the host does not wait to know
                self.hidden = hidden

    def tiles(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Queries, or what belongs to them, (B, H, Nq, ...), in tiles (tiles, rows, ...)."""
        return _blocks(x, self.query_tile, value)

    def pieces(self) -> Iterator[_Piece]:
        for part, place, hidden in self._parts():
            rows = max(1, min(self.query_tile, self._size // self._keys(place)))
            for row in range(0, self.query_tile, rows):
                yield _Piece(part, slice(row, min(row + rows, self.query_tile)), place, hidden)

    @property
    def _size(self) -> int:
        return _PIECE if self.key.device.type == "cpu" else _PIECE_ELSEWHERE

    def _keys(self, place: torch.Tensor | None) -> int:
        return self.key_tile * (1 if place is None else place.shape[1])

    def _parts(self) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Tiles, blocks and hidden entries of pieces, as in `_Piece`; a piece holds as many tiles as fit."""
        if self.hidden is not None and self.key.device.type == "cpu":
            yield from self._ragged_parts()
            return
        tiles = len(self.key) if self.place is None else len(self.place)
        count = max(1, self._size // (self.query_tile * self._keys(self.place)))
        for first in range(0, tiles, count):
            part = slice(first, min(first + count, tiles))
            place = None if self.place is None else self.place[part]
            yield part, place, None if self.hidden is None else self.hidden[part]

    def _ragged_parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """The same for lists of different lengths: the longest come first, and a piece is as wide as its longest list.

        Only the entries after a list's last one are saved.
        """
        shown = ~self.hidden.squeeze(-1)
        number = torch.arange(1, shown.shape[1] + 1, device=shown.device)
        lengths, order = torch.where(shown, number, 0).amax(1).clamp(min=1).sort(descending=True, stable=True)
        lengths, first = lengths.tolist(), 0
        while first < len(lengths):
            length = lengths[first]
            part = order[first : first + max(1, self._size // (self.query_tile * self.key_tile * length))]
            hidden = self.hidden[part, :length]
            yield part, self.place[part, :length], hidden if hidden.any() else None
            first += len(part)

    def keys(self, x: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """The keys or values of a piece, (tiles, L key_tile, D), in the dtype of the computation."""
        if piece.place is None:
            return x[piece.tiles].to(self.dtype)
        found = x.flatten(1).index_select(0, piece.place.flatten()).to(self.dtype)
        return found.view(len(piece.place), -1, x.shape[2])

    def logits(self, query: torch.Tensor, key: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """(tiles, rows, L key_tile), from scaled queries."""
        logit = torch.bmm(query, key.transpose(1, 2))
        bias = self._column(piece)
        return logit if bias is None else logit.add_(bias)

    def _column(self, piece: _Piece) -> torch.Tensor | None:
        """The bias of a piece, (tiles, 1, L key_tile)."""
        if piece.place is None:
            return None if self.bias is None else self.bias[piece.tiles].unsqueeze(1)
        if self.bias is None and piece.hidden is None:
            return None
        shape = (*piece.place.shape, self.key_tile)
        if self.bias is None:
            bias = torch.zeros(shape, dtype=self.dtype, device=self.key.device)
        else:
            bias = self.bias[piece.place]
        if piece.hidden is not None:
            bias = bias.masked_fill_(piece.hidden, -torch.inf)
        return bias.flatten(1).unsqueeze(1)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_tile: int,
    key_tile: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one segment; arguments as in `lowering.Keys`.

    Returns:
        out (B, H, Nq, Dv) in the dtype of the queries, and lse (B, H, Nq) in the dtype of the computation.
    """
    with without_autocast(query):
        call = _Call(query, key, value, index, bias, query_tile, key_tile)
        queries = call.tiles(query)
        out = query.new_empty(*queries.shape[:2], value.shape[-1])
        lse = query.new_empty(queries.shape[:2], dtype=call.dtype)
        for piece in call.pieces():
            own = piece.tiles, piece.rows
            logit = call.logits(queries[own].to(call.dtype) * scale, call.keys(call.key, piece), piece)
            # A row without keys has the maximum -inf; with 0 instead, its weights are exp(-inf) = 0.
            highest = logit.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -torch.inf, 0)
            weight = logit.sub_(highest).exp_()
            total = weight.sum(-1, keepdim=True)
            lse[own] = (highest + total.log()).squeeze(-1)
            found = torch.bmm(weight, call.keys(call.value, piece)) / total.masked_fill(total == 0, 1)
            out[own] = found.to(out.dtype)
        return _rows(out, query), _rows(lse, query, call.dtype)


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_tile: int,
    key_tile: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients with respect to query, key, value and bias, given the results of `forward` and their gradients.

    The weights are recomputed. Pieces are added up in a fixed order; on a CPU the same call gives the same bits.
    """
    with without_autocast(query):
        call = _Call(query, key, value, index, bias, query_tile, key_tile)
        # dp/ds is p (dp - delta); a gradient of lse adds p to each logit's.
        delta = call.tiles((grad.to(call.dtype) * out.to(call.dtype)).sum(-1) - grad_lse).unsqueeze(-1)
        queries, grads = call.tiles(query), call.tiles(grad)
        # Rows without keys, and rows past the last query: exp(-inf - inf) = 0.
        lse = call.tiles(lse.masked_fill(lse == -torch.inf, torch.inf), torch.inf).unsqueeze(-1)
        grad_query = torch.empty_like(queries, dtype=call.dtype)
        grad_key, grad_value = (torch.zeros_like(x, dtype=call.dtype) for x in (call.key, call.value))
        grad_bias = None if bias is None else torch.zeros_like(call.bias)

        def add(total: torch.Tensor, part: torch.Tensor, piece: _Piece) -> None:
            if piece.place is None:
                total[piece.tiles].add_(part)
            else:
                total.flatten(1).index_add_(0, piece.place.flatten(), part.view(piece.place.numel(), -1))

        for piece in call.pieces():
            own = piece.tiles, piece.rows
            part_key, part_value = call.keys(call.key, piece), call.keys(call.value, piece)
            part_query, part_grad = queries[own].to(call.dtype) * scale, grads[own].to(call.dtype)
            weight = call.logits(part_query, part_key, piece).sub_(lse[own]).exp_()
            add(grad_value, torch.bmm(weight.transpose(1, 2), part_grad), piece)
            pair = torch.bmm(part_grad, part_value.transpose(1, 2)).sub_(delta[own]).mul_(weight)
            grad_query[own] = torch.bmm(pair, part_key)
            add(grad_key, torch.bmm(pair.transpose(1, 2), part_query), piece)
            if grad_bias is not None:
                add(grad_bias, pair.sum(1), piece)
        if grad_bias is not None:
            full = grad_bias.view(*query.shape[:2], -1)[..., : key.shape[2]]
            grad_bias = full.sum_to_size(bias.shape).to(bias.dtype).contiguous()
        return _rows(grad_query.mul_(scale), query), _rows(grad_key, key), _rows(grad_value, value), grad_bias

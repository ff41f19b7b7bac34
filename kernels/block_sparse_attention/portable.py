"""Attention by a plan in standard operations: tiles are gathered in pieces that stay in the caches.

`forward` and `backward` run inside the op, on real tensors, for one segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast

# Keys that are gathered at a time, and logits that are computed at a time: on a CPU as many as the caches hold
# (README.md), elsewhere few enough for any memory.
_KEYS, _LOGITS = 1 << 13, 1 << 19
_KEYS_ELSEWHERE, _LOGITS_ELSEWHERE = 1 << 18, 1 << 25
_MASK = 1 << 22  # elements of a mask at a time


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
        tiles: which tiles: a slice, or their numbers.
        rows: which queries of each tile; all, unless one tile is larger than a piece.
        place: (tiles, L) the numbers of their blocks among the blocks of all images and heads; None: the tile's own.
        column: (tiles, 1, L key_tile) the bias of their keys, -inf where a list has no key; or None.
    """

    tiles: slice | torch.Tensor
    rows: slice
    place: torch.Tensor | None
    column: torch.Tensor | None

    @property
    def own(self) -> tuple:
        """The index of the queries of the piece."""
        return self.tiles, self.rows


class _Call:
    """One call: its tensors in tiles and blocks, and the pieces in which it is computed."""

    def __init__(self, query, key, value, index, bias, query_tile: int, key_tile: int):
        self.dtype, self.on_cpu = accumulator(query), query.device.type == "cpu"
        batch, heads, queries, _ = query.shape
        keys, self.heads = key.shape[2], batch * heads
        # Attention to all keys is one block, and one list for all queries of a head is one tile.
        self.key_tile = keys if index is None else key_tile
        self.query_tile = queries if index is None or index.shape[2] == 1 else query_tile
        self.key, self.value = _blocks(key, self.key_tile), _blocks(value, self.key_tile)
        self.bias = self.place = self.hidden = None
        if bias is not None or keys % self.key_tile:
            bias = query.new_zeros(1, 1, keys, dtype=self.dtype) if bias is None else bias.to(self.dtype)
            self.bias = _blocks(bias.expand(batch, heads, keys), self.key_tile, -torch.inf)
        if index is not None:
            index = index.expand(batch, heads, -1, -1)
            first = torch.arange(self.heads, device=index.device) * (len(self.key) // self.heads)
            self.place = (index.clamp(min=0) + first.view(batch, heads, 1, 1)).flatten(0, 2)
            hidden = (index < 0).flatten(0, 2)
            if not self.on_cpu or hidden.any():  # elsewhere the host does not wait to know
                self.hidden = hidden

    def tiles(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Queries, or what belongs to them, (B, H, Nq, ...), in tiles (tiles, rows, ...)."""
        return _blocks(x, self.query_tile, value)

    def pieces(self, whole: bool = False) -> Iterator[_Piece]:
        """The pieces; on a CPU, tiles without a list are in none.

        Args:
            whole: whether a piece has all queries of its tiles. Otherwise they are cut where logits are too many.
        """
        most_keys, most_logits = (_KEYS, _LOGITS) if self.on_cpu else (_KEYS_ELSEWHERE, _LOGITS_ELSEWHERE)
        order, lengths = self._longest_first()
        at, rows = 0, self.query_tile
        while at < len(lengths) and lengths[at]:
            keys = lengths[at] * self.key_tile
            count = max(1, most_keys // keys)
            tiles = slice(at, at + count) if order is None else order[at : at + count]
            place, column = self._gathered(tiles, lengths[at])
            step = rows if whole else max(1, most_logits // (count * keys))
            for first in range(0, rows, step):
                yield _Piece(tiles, slice(first, first + step), place, column)
            at += count

    def _longest_first(self) -> tuple[torch.Tensor | None, list[int]]:
        """The tiles in the order of the lengths of their lists (None: all are full), and these lengths."""
        count, entries = (len(self.key), 1) if self.place is None else self.place.shape
        if self.hidden is None or not self.on_cpu:
            return None, [entries] * count
        lengths = torch.where(self.hidden, 0, torch.arange(1, entries + 1)).amax(1)
        order = lengths.argsort(descending=True, stable=True)
        return order, lengths[order].tolist()

    def _gathered(self, tiles, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The places of the first `length` entries of some tiles' lists, and the bias of their keys."""
        if self.place is None:
            return None, None if self.bias is None else self.bias[tiles].unsqueeze(1)
        place = self.place[tiles, :length]
        if self.bias is None and self.hidden is None:
            return place, None
        shape = (*place.shape, self.key_tile)
        column = self.bias[place] if self.bias is not None else self.key.new_zeros(shape, dtype=self.dtype)
        if self.hidden is not None:
            column = column.masked_fill(self.hidden[tiles, :length].unsqueeze(-1), -torch.inf)
        return place, column.flatten(1).unsqueeze(1)

    def prefers_a_mask(self) -> bool:
        """Whether attention to all keys with a mask is faster than to gathered keys; measured (README.md)."""
        if self.place is None or len(self.place) == self.heads:
            return False
        listed = sum(self._longest_first()[1]) / len(self.place)
        return listed * (0.8 + 40 / self.query_tile) > 1.15 * len(self.key) / self.heads

    def keys(self, x: torch.Tensor, piece: _Piece) -> torch.Tensor:
        """The keys or values of a piece: (tiles, L key_tile, D)."""
        if piece.place is None:
            return x[piece.tiles]
        found = x.flatten(1).index_select(0, piece.place.flatten())
        return found.view(len(piece.place), -1, x.shape[2])


def _attention(query, key, value, column, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's attention for CPUs: (tiles, rows, D), (tiles, K, D), (tiles, K, D), and (tiles, 1, K) or None."""
    query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    mask = None if column is None else column.unsqueeze(1)
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = function(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    return out.squeeze(1), lse.squeeze(1)


def _plain(query, key, value, column, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_attention`, in plain products, for any width of the values."""
    dtype = accumulator(query)
    logit = torch.bmm(query.to(dtype) * scale, key.to(dtype).mT)
    if column is not None:
        logit.add_(column)
    return torch.bmm(logit.softmax(-1), value.to(dtype)), logit.logsumexp(-1)


def _without_keys(out, lse, column) -> tuple[torch.Tensor, torch.Tensor]:
    """Results with 0 and -inf in rows whose bias, (tiles, rows or 1, K), leaves them no key."""
    if column is None:
        return out, lse
    empty = column.amax(-1) == -torch.inf
    return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)


def _masked(call: _Call, queries: torch.Tensor, scale: float) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The results of some tiles at a time, from attention to all keys with a mask of logarithms of multiplicities."""
    tiles, blocks = len(call.place) // call.heads, len(call.key) // call.heads
    step = max(1, _MASK // (call.query_tile * blocks * call.key_tile))
    for head in range(call.heads):
        own = slice(head * blocks, (head + 1) * blocks)
        key, value = call.key[own].flatten(0, 1), call.value[own].flatten(0, 1)
        for first in range(head * tiles, (head + 1) * tiles, step):
            part = slice(first, min(first + step, (head + 1) * tiles))
            place = call.place[part] - own.start
            real = torch.ones_like(place) if call.hidden is None else ~call.hidden[part]
            count = torch.zeros(len(place), blocks, dtype=call.dtype).scatter_add_(1, place, real.to(call.dtype))
            mask = count.log_().repeat_interleave(call.key_tile, 1)
            if call.bias is not None:
                mask = mask + call.bias[own].flatten()
            mask = mask.repeat_interleave(call.query_tile, 0)[None]
            out, lse = _attention(queries[part].flatten(0, 1)[None], key[None], value[None], mask, scale)
            out, lse = _without_keys(out, lse, mask)
            yield part, out.view(*queries[part].shape[:2], -1), lse.view(-1, call.query_tile)


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
        out = query.new_zeros(*queries.shape[:2], value.shape[-1])
        lse = query.new_full(queries.shape[:2], -torch.inf, dtype=call.dtype)
        fast = call.on_cpu and query.shape[-1] == value.shape[-1]
        if fast and call.prefers_a_mask():
            for part, found, sums in _masked(call, queries, scale):
                out[part], lse[part] = found, sums
        else:
            attend = _attention if fast else _plain
            for piece in call.pieces(whole=fast):
                keys, values = call.keys(call.key, piece), call.keys(call.value, piece)
                results = attend(queries[piece.own], keys, values, piece.column, scale)
                out[piece.own], lse[piece.own] = _without_keys(*results, piece.column)
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
        grad_query, grad_key, grad_value = (
            torch.zeros_like(x, dtype=call.dtype) for x in (queries, call.key, call.value)
        )
        grad_bias = None if bias is None else torch.zeros_like(call.bias)

        def add(total: torch.Tensor, part: torch.Tensor, piece: _Piece) -> None:
            if piece.place is None:
                total[piece.tiles].add_(part)
            else:
                total.flatten(1).index_add_(0, piece.place.flatten(), part.view(piece.place.numel(), -1))

        for piece in call.pieces():
            keys, values = (call.keys(x, piece).to(call.dtype) for x in (call.key, call.value))
            part_query, part_grad = queries[piece.own].to(call.dtype) * scale, grads[piece.own].to(call.dtype)
            weight = torch.bmm(part_query, keys.mT)
            if piece.column is not None:
                weight.add_(piece.column)
            weight.sub_(lse[piece.own]).exp_()
            add(grad_value, torch.bmm(weight.mT, part_grad), piece)
            pair = torch.bmm(part_grad, values.mT).sub_(delta[piece.own]).mul_(weight)
            grad_query[piece.own] = torch.bmm(pair, keys)
            add(grad_key, torch.bmm(pair.mT, part_query), piece)
            if grad_bias is not None:
                add(grad_bias, pair.sum(1), piece)
        if grad_bias is not None:
            full = grad_bias.view(*query.shape[:2], -1)[..., : key.shape[2]]
            grad_bias = full.sum_to_size(bias.shape).to(bias.dtype).contiguous()
        return _rows(grad_query.mul_(scale), query), _rows(grad_key, key), _rows(grad_value, value), grad_bias

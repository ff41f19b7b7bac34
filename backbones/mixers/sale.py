"""SALE: attention to tiles of keys of which an estimate in 4 bits says that one of their weights is large.

Paper: SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling, arXiv 2505.24179.
Official code (without a licence; nothing of it is used here): github.com/BirdChristopher/SALE.
"""

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import number
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._selector import Selector, Tokens, listed, positive
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention
from terrazzo.kernels.dispatch import arguments

_LEAST = 1e-4


class SALE(Selector):
    """Softmax attention to tiles of keys in which exp(estimate_ij - m_i) / l_i > tau for any pair of a query and a key.

    m_i and l_i are the largest logit and the sum exp(logit - m_i) over the keys that are always computed: the tile
    itself, the 8 tiles around it, the tokens in front and, with `sink`, the first tile. With q' = q - mean(q) and
    k' = k - mean(k), whose products with all queries are those of k up to a number for each query,

        estimate_ij = s (round4(q'_i) round4(k'_j) + mean(q) k'_j)

    where round4 rounds a token to the integers -7 to 7 times max|x| / 7. The estimate looks at all N^2 pairs, which
    pays where products of 4 or 8 bits are much faster than the attention's; it does not pay in floating point on a CPU.
    The mixer has no parameters and is meant for models that are trained already.

    The paper's form is causal, and its window lies before the query; ours surrounds the query in the map.

    Source: arXiv 2505.24179, section 3.

    Args:
        tau: the threshold, 0 for softmax attention. `calibrate` sets it for each head.
        edge: patches on a side of a tile.
        sink: whether all queries attend to the first tile.
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    def __init__(
        self,
        host: Host,
        tau: float = 0.008,
        edge: int = 8,
        sink: bool = False,
        dense_up_to: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        self.start = float(number("tau", tau))
        if not 0 <= self.start < 1:
            raise InputError(f"tau must be from 0 to below 1, got {tau!r}")
        self.edge, self.sink = arguments.whole(edge, "edge", 1), sink
        self.register_buffer("tau", torch.full((host.heads,), self.start, device=device, dtype=dtype))

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (self.edge,)

    def plan(self, tokens: Tokens) -> Plan:
        size, around = self.edge**2, tokens.tiles.neighbours(tokens.query.device)
        if self.sink:
            new = ~(around == 0).any(1, keepdim=True)
            around = torch.cat([around, torch.where(new, 0, -1)], 1)
        kept = kept_tiles(tokens.query, tokens.key, around, self.tau, size, size, tokens.real(), tokens.front_key)
        return Plan([*tokens.front(), Segment("block", listed(kept), key_mask=tokens.real())], size, size)

    def reset(self) -> None:
        self.tau.fill_(self.start)

    @torch.no_grad()
    def calibrate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, error: float = 0.4
    ) -> None:
        """Halve tau, for each head, while a query's outputs differ too much from softmax attention's.

        Below 1e-4, tau becomes 0.

        Args:
            query, key, value, place: as `forward` takes them.
            error: the sum of the absolute differences of a query, a mean over queries; the paper's is 0.4.
        """
        positive("error", error)
        tokens = self.tokens(query, key, value, place)
        given = tokens.query, tokens.key, tokens.value
        everything = Plan([*tokens.front(), Segment("all", key_mask=tokens.real())])
        wanted, _ = block_sparse_attention(*given, everything)
        while True:
            found, _ = block_sparse_attention(*given, self.plan(tokens))
            far = tokens.tiles.restore((found - wanted).abs()).sum(3).mean((0, 2)) >= error
            if not (far & (self.tau > 0)).any():
                return
            halved = self.tau / 2
            self.tau.copy_(torch.where(far, torch.where(halved > _LEAST, halved, 0), self.tau))


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (..., D) as integers from -7 to 7 in the dtype of `x`, and their scales (..., 1)."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return (x / scale.masked_fill(scale == 0, 1)).round(), scale


def centred(x: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, heads, N, D) without their mean, and the mean (B, heads, 1, D).

    Args:
        real: (1, N) bool, tokens that are no padding, whose values are 0; None for all.
    """
    mean = x.mean(2, keepdim=True) if real is None else x.sum(2, keepdim=True) / real.sum()
    return x - mean, mean


@torch.no_grad()
def kept_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    always: torch.Tensor,
    tau: torch.Tensor,
    query_tile: int,
    key_tile: int,
    real: torch.Tensor | None = None,
    front_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tiles of keys that each tile of queries attends to, (B, heads, query tiles, key tiles) bool.

    Args:
        query, key: (B, heads, N, D).
        always: (query tiles, L) tiles of keys that are always computed, -1 for none.
        tau: (heads,) thresholds.
        query_tile, key_tile: tokens of a tile; the last ones may be shorter.
        real: (1, N) bool, tokens that are no padding; None for all.
        front_key: (B, heads, P, D), further keys that are always computed.
    """
    dtype, scale = torch.promote_types(query.dtype, torch.float32), query.shape[-1] ** -0.5
    query, key = query.to(dtype), key.to(dtype)
    (smooth_query, mean), (smooth_key, key_mean) = centred(query, real), centred(key, real)
    if real is None:
        real = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    (query4, query_scale), (key4, key_scale) = quantised(smooth_query), quantised(smooth_key)
    queries, estimates = _tiles(query * scale, query_tile), _tiles(query4 * (query_scale * scale), query_tile)
    # A channel of ones subtracts a query's bound in the product itself: other passes over all pairs would take longer.
    estimated_key = F.pad(key4 * key_scale, (0, 1), value=1).transpose(-1, -2)
    shift = (scale * mean @ smooth_key.transpose(-1, -2)).masked_fill(~real[:, None, None], -torch.inf)
    hidden_key = _tiles(~real[:, None, :, None], key_tile, True)[0, 0, :, :, 0]  # tiles key_tile
    hidden_query = _tiles(~real[:, None, :, None], query_tile, True)[0, 0, :, :, 0]
    blocks = _tiles(smooth_key, key_tile)
    front = None if front_key is None else (front_key.to(dtype) - key_mean).transpose(-1, -2)
    kept = []
    for tile, listed_tiles in enumerate(always.unbind()):  # one tile of queries at a time: all pairs would not fit
        own = listed_tiles.clamp(min=0)
        exact = queries[:, :, tile] @ blocks[:, :, own].flatten(2, 3).transpose(-1, -2)
        hidden = (hidden_key[own] | (listed_tiles < 0).unsqueeze(1)).flatten()
        exact = exact.masked_fill(hidden, -torch.inf)
        if front is not None and front.shape[-1]:
            exact = torch.cat([exact, queries[:, :, tile] @ front], -1)
        bound = exact.logsumexp(-1, keepdim=True).masked_fill(hidden_query[tile].unsqueeze(1), torch.inf)  # m + ln l
        above = (torch.cat([estimates[:, :, tile], -bound], -1) @ estimated_key).amax(2, keepdim=True)
        above = _tiles((above + shift).transpose(-1, -2), key_tile, -torch.inf).amax((3, 4))  # B heads key-tiles
        found = (above > tau.to(dtype).log()[:, None]) | (tau == 0)[:, None]
        # -1 means the last of one tile more, which is dropped.
        more = F.pad(found, (0, 1)).index_fill(2, listed_tiles % (found.shape[2] + 1), True)
        kept.append(more[..., :-1])
    return torch.stack(kept, 2)


def _tiles(x: torch.Tensor, size: int, value: float = 0) -> torch.Tensor:
    """(B, heads, N, D) to (B, heads, tiles, size, D); the last tile is filled with `value`."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size), value=value).unflatten(2, (-1, size))

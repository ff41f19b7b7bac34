"""Anchor: attention to neighbouring tiles, and to single keys whose logits come near the largest one among these.

Paper: AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, arXiv 2505.23520.
Official code (MIT), causal and for language models: github.com/yuzhouzhang9/Anchor-Attention.
"""

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import number
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._selector import Selector, Tokens, listed, positive, tile_means
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention
from terrazzo.kernels.dispatch import arguments

_FARTHEST, _HALVINGS = 20.0, 8


class Anchor(Selector):
    """Softmax attention of a tile to its anchor and to single further keys.

    The anchor of a tile is the tile itself, the 8 tiles around it and the tokens in front. Let m_i be the largest logit
    of query i in its anchor. A key j outside is kept for a group of tiles if, for any tile t of the group,

        s mean(q in t) k_j + theta >= mean(m in t).

    The choice costs N^2 / edge^2 products of keys and mean queries, and half of the attention to the anchor. It is
    meant for models that are trained already: it has no parameters.

    The paper's form is causal. Its anchor is the first tile and the tiles shortly before the query; ours surrounds the
    query in the map. The official code counts some keys twice, and here every pair counts once.

    Source: arXiv 2505.23520, section 3.

    Args:
        theta: how far below the largest logit a key may lie, in natural units; the paper's is 12. `calibrate` sets it
            for each head.
        edge: patches on a side of a tile.
        group: tiles on a side of a group.
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    def __init__(
        self,
        host: Host,
        theta: float = 12.0,
        edge: int = 8,
        group: int = 2,
        dense_up_to: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        self.edge, self.group = arguments.whole(edge, "edge", 1), arguments.whole(group, "group", 1)
        self.start = float(number("theta", theta))
        self.calibrated = False
        self.register_buffer("theta", torch.full((host.heads,), self.start, device=device, dtype=dtype))

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (self.edge,)

    def plan(self, tokens: Tokens) -> Plan:
        size, around = self.edge**2, tokens.tiles.neighbours(tokens.query.device)
        anchor = Segment("block", around[None, None], key_mask=tokens.real())
        return Plan([*tokens.front(), anchor, Segment("token", listed(self.kept(tokens, around)))], size, size)

    @torch.no_grad()
    def kept(self, tokens: Tokens, around: torch.Tensor) -> torch.Tensor:
        """The slots outside of each tile's anchor that the tile attends to, (B, heads, tiles, slots) bool.

        Args:
            around: (tiles, 9) the tiles of each anchor, -1 for none.
        """
        size, tiles = self.edge**2, tokens.tiles
        counts, real = tiles.counts(self.edge, around.device), tokens.real()
        largest = _largest(tokens, around, size)
        if real is not None:
            largest = largest.masked_fill(~real, 0)
        bound = tile_means(largest.unsqueeze(-1), size, counts)  # B heads tiles 1
        query = tile_means(tokens.query, size, counts) * tokens.query.shape[-1] ** -0.5
        # One head at a time, for memory.
        near = [
            self._grouped(q @ k.transpose(-1, -2) + theta >= m, tiles.rows, tiles.cols)
            for q, k, m, theta in zip(query.unbind(1), tokens.key.unbind(1), bound.unbind(1), self.theta.unbind())
        ]
        kept = torch.stack(near, 1)
        own = torch.zeros(len(around), len(around) + 1, dtype=torch.bool, device=around.device)
        own = own.scatter(1, around % (len(around) + 1), True)[:, :-1]  # -1 means the last column, which is dropped
        kept = kept & ~own.repeat_interleave(size, 1)
        return kept if real is None else kept & real

    def _grouped(self, near: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """What any tile of a group has, for all its tiles: (B, tiles, slots) bool."""
        group = self.group
        x = near.unflatten(1, (rows, cols))
        x = F.pad(x, (0, 0, 0, -cols % group, 0, -rows % group))
        x = x.unflatten(2, (-1, group)).unflatten(1, (-1, group)).any(4).any(2)
        x = x.repeat_interleave(group, 1).repeat_interleave(group, 2)
        return x[:, :rows, :cols].flatten(1, 2)

    def reset(self) -> None:
        self.theta.fill_(self.start)
        self.calibrated = False

    @torch.no_grad()
    def calibrate(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, recall: float = 0.95
    ) -> None:
        """Find, for each head, the smallest theta whose plan covers a part of the attention's weight.

        The search is a bisection from -20 to 20. Of several calls since `reset`, the largest theta stays.

        Args:
            query, key, value, place: as `forward` takes them.
            recall: the part, a mean over queries.

        Raises:
            InputError: `recall` is no number between 0 and 1.
        """
        if not 0 < positive("recall", recall) < 1:
            raise InputError(f"recall must be between 0 and 1, got {recall!r}")
        tokens = self.tokens(query, key, value, place)
        everything = Plan([*tokens.front(), Segment("all", key_mask=tokens.real())])
        _, whole = block_sparse_attention(tokens.query, tokens.key, tokens.value, everything)
        least = self.theta.clone() if self.calibrated else torch.full_like(self.theta, -_FARTHEST)
        low, high = torch.full_like(self.theta, -_FARTHEST), torch.full_like(self.theta, _FARTHEST)
        for _ in range(_HALVINGS):
            self.theta.copy_((low + high) / 2)
            _, lse = block_sparse_attention(tokens.query, tokens.key, tokens.value, self.plan(tokens))
            enough = tokens.tiles.restore((lse - whole).exp().unsqueeze(-1)).mean((0, 2, 3)) >= recall
            low, high = torch.where(enough, low, self.theta), torch.where(enough, self.theta, high)
        self.theta.copy_(torch.maximum(high, least))
        self.calibrated = True


def _largest(tokens: Tokens, around: torch.Tensor, size: int) -> torch.Tensor:
    """The largest logit of each query in its anchor, (B, heads, slots)."""
    query = (tokens.query * tokens.query.shape[-1] ** -0.5).unflatten(2, (-1, size))
    key, real = tokens.key.unflatten(2, (-1, size)), tokens.real()
    found = []
    for tile in around.unbind(1):
        logit = query @ key[:, :, tile.clamp(min=0)].transpose(-1, -2)
        hidden = (tile < 0)[:, None, None]
        if real is not None:
            hidden = hidden | ~real.unflatten(1, (-1, size))[0, tile.clamp(min=0)].unsqueeze(1)
        found.append(logit.masked_fill(hidden, -torch.inf).amax(-1))
    if tokens.front_key.shape[2]:
        found.append((query @ tokens.front_key.unsqueeze(2).transpose(-1, -2)).amax(-1))
    return torch.stack(found).amax(0).flatten(2)

"""Routing: attention inside clusters of queries and keys, beside heads with attention inside tiles.

Paper: Efficient Content-Based Sparse Attention with Routing Transformers, TACL 2021, arXiv 2003.05997.
Reference code (MIT, a third party's): github.com/lucidrains/routing-transformer.
"""

import torch
import torch.nn.functional as F

from terrazzo.backbones._checks import number
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, softmax_attention
from terrazzo.backbones.mixers._selector import Selector, Tokens
from terrazzo.backbones.mixers._tiles import Tiles
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention
from terrazzo.kernels.dispatch import arguments


class Routing(Selector):
    """Softmax attention of the w queries nearest to a centroid to the w keys nearest to it, with w = N / clusters.

    A head has `clusters` centroids, and nearness is the product with the query or key of length 1. A query in several
    clusters has the mean of their outputs, and a query in no cluster has output 0. The first `local` heads have
    attention inside tiles of `edge` x `edge` patches in place of this. The cost is N w for a routed head.

    In training, each pass moves the centroids by 1 - `decay` towards the means of the queries and keys of length 1 that
    are nearest to each (an online k-means). `calibrate` sets them by 10 steps of k-means on images; before, they are
    random directions. The paper initialises them at the first pass, and adds a loss, which `commitment` computes. The
    third party's code divides the sum of a query's outputs by their number + 1e-5.

    Source: arXiv 2003.05997, section 4.

    Args:
        clusters: centroids of a head; the paper's choice is about the square root of N.
        local: heads with attention inside tiles; None for half of them.
        edge: patches on a side of these tiles.
        decay: part of a centroid that remains in a step.
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    plans_layer = False  # the routed heads alone, and keys in the order of clusters

    def __init__(
        self,
        host: Host,
        clusters: int = 16,
        local: int | None = None,
        edge: int = 8,
        decay: float = 0.999,
        dense_up_to: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        self.local = host.heads // 2 if local is None else arguments.whole(local, "local", 0)
        if self.local >= host.heads:
            raise InputError(f"local must be below the number of heads, {host.heads}, got {local!r}")
        self.edge, clusters = arguments.whole(edge, "edge", 1), arguments.whole(clusters, "clusters", 1)
        self.decay = float(number("decay", decay))
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay must be from 0 to 1, got {decay!r}")
        shape = host.heads - self.local, clusters, host.head_dim
        self.register_buffer("centroids", F.normalize(torch.randn(shape, device=device, dtype=dtype), dim=-1))

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (1,)

    def plan(self, tokens: Tokens) -> Plan:
        """The plan of the routed heads: tokens hold these alone, in raster order."""
        clusters = self.centroids.shape[1]
        width = -(-tokens.key.shape[2] // clusters)
        rows, index = routes(tokens.query, self.centroids, width), routes(tokens.key, self.centroids, width)
        place = index.flatten(2).unsqueeze(-1)
        key, value = (x.gather(2, place.expand(-1, -1, -1, x.shape[-1])) for x in (tokens.key, tokens.value))
        own = torch.arange(clusters, device=index.device).view(1, 1, -1, 1)
        segment = Segment("block", own, key=key, value=value)
        return Plan([*tokens.front(), segment], width, width, rows.flatten(2), "mean")

    def density(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> float:
        """The part of all pairs of a patch and a token that the mixer computes, a mean over both kinds of heads."""
        if self.dense(place.grid, place.prefix) is not None:
            return 1.0
        patches, clusters = place.grid[0] * place.grid[1], self.centroids.shape[1]
        width, tiles = -(-patches // clusters), Tiles(place.grid, (self.edge,))
        routed = clusters * width * (width + place.prefix)
        filled = tiles.counts(self.edge)
        near = tiles.slots * self.edge**2 if filled is None else int(filled.square().sum())
        pairs = self.local * (near + patches * place.prefix) + len(self.centroids) * routed
        return pairs / (self.host.heads * patches * (patches + place.prefix))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        first = softmax_attention(query[:, :, : place.prefix], key, value, place)
        tokens = self.tokens(*(x[:, self.local :] for x in (query, key, value)), place)
        out, _ = block_sparse_attention(*tokens[:3], self.plan(tokens))
        if self.training:
            self.step(tokens)
        if self.local:
            near = self._in_tiles(*(x[:, : self.local] for x in (query, key, value)), place)
            out = torch.cat([near, out], 1)
        return torch.cat([first, out], 2)

    def _in_tiles(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Attention of the patches (B, local heads, N, D) inside tiles, and to the tokens in front."""
        tokens, tiles = self.tokens(query, key, value, place), Tiles(place.grid, (self.edge,))
        arranged = (tiles.arrange(x) for x in tokens[:3])
        tokens = Tokens(*arranged, tokens.front_key, tokens.front_value, tiles)
        number = torch.arange(tiles.rows * tiles.cols, device=query.device).view(1, 1, -1, 1)
        own = Segment("block", number, key_mask=tokens.real())
        plan = Plan([*tokens.front(), own], self.edge**2, self.edge**2)
        return tiles.restore(block_sparse_attention(*tokens[:3], plan)[0])

    @torch.no_grad()
    def step(self, tokens: Tokens) -> None:
        """Move the centroids towards the means of what is nearest to them."""
        both = F.normalize(torch.cat([tokens.query, tokens.key], 2), dim=-1).to(self.centroids.dtype)
        self.centroids.lerp_(nearest_means(both, self.centroids), 1 - self.decay)

    def commitment(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The paper's auxiliary loss: the mean squared distance of queries and keys of length 1 to their centroids.

        Args:
            query, key: (B, routed heads, N, D).
        """
        both = F.normalize(torch.cat([query, key], 2), dim=-1)
        place = nearest(both, self.centroids).unsqueeze(-1).expand_as(both)
        centroids = self.centroids.expand(len(both), -1, -1, -1)
        return F.mse_loss(both, centroids.gather(2, place))

    def reset(self) -> None:
        pass  # `calibrate` begins with what it is given

    @torch.no_grad()
    def calibrate(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> None:
        """Set the centroids by 10 steps of k-means from tokens at equal distances.

        Args:
            query, key, value, place: as `forward` takes them.
        """
        both = torch.cat([query[:, self.local :, place.prefix :], key[:, self.local :, place.prefix :]], 2)
        both = F.normalize(both, dim=-1).to(self.centroids.dtype)
        pool = both.transpose(0, 1).flatten(1, 2)  # heads tokens D
        clusters = self.centroids.shape[1]
        start = torch.arange(clusters, device=pool.device) * pool.shape[1] // clusters
        self.centroids.copy_(pool[:, start])
        for _ in range(10):
            self.centroids.copy_(nearest_means(both, self.centroids))


@torch.no_grad()
def routes(x: torch.Tensor, centroids: torch.Tensor, width: int) -> torch.Tensor:
    """The tokens nearest to each centroid: (B, heads, N, D) to (B, heads, clusters, width)."""
    near = centroids.to(x.dtype) @ F.normalize(x, dim=-1).transpose(-1, -2)
    return near.topk(width, -1).indices


@torch.no_grad()
def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid nearest to each token: (B, heads, N, D) to (B, heads, N)."""
    return (x @ centroids.to(x.dtype).transpose(-1, -2)).argmax(-1)


def nearest_means(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Means of the tokens (B, heads, N, D) nearest to each centroid, with length 1; a centroid without tokens stays."""
    own = F.one_hot(nearest(x, centroids), centroids.shape[1]).to(x.dtype)  # B heads N clusters
    sums = (own.transpose(-1, -2) @ x).sum(0)
    empty = own.sum((0, 2)) == 0
    return torch.where(empty.unsqueeze(-1), centroids, F.normalize(sums, dim=-1))

"""Combiner: full attention whose weights factor into a group's weight and the weights inside a group.

Paper: Combiner: Full Attention Transformer with Sparse Computation Cost, NeurIPS 2021, arXiv 2107.05768.
"""

import math

import torch
import torch.nn.functional as F

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.backbones.mixers._tiling import Tiling
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments

_PATTERNS, _POOLS = ("tile", "axial"), ("max", "mean")


class Combiner(Mixer):
    """A token attends to each token of its own group, and to every other group as a whole.

    A group g has a pooled query q_g and a pooled key k_g. The weights inside it are p(j | g) = softmax_j(s q_g k_j),
    and its value is v_g = sum_j p(j | g) v_j, with s = D^(-1/2). A token's logits s q k_j for its own group and s q k_g
    for all other groups share one softmax. With groups of about sqrt(N) tokens the cost is 4 N sqrt(N) D instead of
    2 N^2 D.

    A model has to be trained with it: where a group's keys are equal, its weight is e^(s q k), and softmax attention
    gives e^(s q k) for each token of the group. `size_bias` adds the logarithm of the group's size.

    Ours: `size_bias`; groups on a map; tokens in front are keys of every token, and attend to every token.

    Args:
        pattern: "tile" for square tiles (the paper's fixed blocks, on a map), "axial" for columns.
        tile: Edge of a tile; None for the edge nearest to N^(1/4). For "tile" only.
        pool: "max" or "mean", how a group's queries and keys become one. The paper takes the maximum of each channel.
        size_bias: Whether a group's logit gets the logarithm of its number of tokens.

    Source: arXiv 2107.05768, in the form for both directions.
    """

    def __init__(
        self,
        host: Host,
        pattern: str = "tile",
        tile: int | None = None,
        pool: str = "max",
        size_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        for name, value, known in (("pattern", pattern, _PATTERNS), ("pool", pool, _POOLS)):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if tile is not None and pattern != "tile":
            raise InputError(f"tile is for pattern 'tile' only, got tile={tile!r} with {pattern!r}")
        self.pattern, self.pool, self.size_bias = pattern, pool, size_bias
        self.tile = tile if tile is None else arguments.whole(tile, "tile", 1)

    def _tiling(self, grid: tuple[int, int]) -> Tiling:
        if self.pattern == "axial":
            return Tiling(grid, (grid[0], 1))
        edge = self.tile or round(math.sqrt(math.sqrt(grid[0] * grid[1])))
        return Tiling(grid, tuple(min(edge, side) for side in grid))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        tiling = self._tiling(place.grid)
        absent = None if tiling.full else tiling.absent(query.device)
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        q, k, v = (tiling.cut(x[:, :, place.prefix :]) for x in (query, key, value))  # B heads tiles tokens D
        group_key, inner = self._pooled(k, absent), None if absent is None else _minus(absent, q)[None, :, None]
        group_query = self._pooled(q, absent).unsqueeze(3)
        group_value = (
            F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (group_query, k, v)), attn_mask=inner)
            .unflatten(0, query.shape[:2])
            .squeeze(3)
        )
        keys = torch.cat([_each(key[:, :, : place.prefix], tiling), k, _each(group_key, tiling)], 3)
        values = torch.cat([_each(value[:, :, : place.prefix], tiling), v, _each(group_value, tiling)], 3)
        mask = self._mask(tiling, absent, place.prefix, q)
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, keys, values)), attn_mask=mask)
        return torch.cat([front, tiling.joined(out.unflatten(0, query.shape[:2]))], 2)

    def _pooled(self, x: torch.Tensor, absent: torch.Tensor | None) -> torch.Tensor:
        """(B, heads, tiles, tokens, D) to (B, heads, tiles, D)."""
        if self.pool == "max":
            return (x if absent is None else x.masked_fill(absent[..., None], -math.inf)).amax(3)
        return x.mean(3) if absent is None else x.sum(3) / (~absent).sum(1, keepdim=True)

    def _mask(self, tiling: Tiling, absent: torch.Tensor | None, prefix: int, like: torch.Tensor) -> torch.Tensor:
        """What is added to the logits of each tile's queries, (1, tiles, 1, keys)."""
        own = like.new_zeros(tiling.count, like.shape[3])
        groups = torch.zeros_like(own[:, :1]).expand(-1, tiling.count)
        if absent is not None:
            own = _minus(absent, like)
        if self.size_bias:
            sizes = own.isfinite().sum(1).to(like.dtype).log()
            groups = groups + sizes
        groups = groups.masked_fill(torch.eye(tiling.count, dtype=torch.bool, device=like.device), -math.inf)
        return F.pad(torch.cat([own, groups], 1), (prefix, 0))[None, :, None]


def _each(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """(B, heads, M, D) for each tile: (B, heads, tiles, M, D)."""
    return x.unsqueeze(2).expand(-1, -1, tiling.count, -1, -1)


def _minus(absent: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(absent, dtype=like.dtype).masked_fill(absent, -math.inf)

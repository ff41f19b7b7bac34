"""LLSA: log-linear sparse attention to chosen tiles, and to the means of all tiles.

Paper: Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers, CVPR 2026, arXiv 2512.16615.
Official code (S-Lab License 1.0, non-commercial; nothing of it is used here): github.com/SingleZombie/LLSA.
"""

import math

import torch

from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._selector import Selector, Tokens, ranked, tile_means
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment
from terrazzo.kernels.dispatch import arguments

# Level 2 pays from this number of means of tiles: the paper's 16384 tokens in tiles of 16.
_MEANS = 1024


class LLSA(Selector):
    """out_i = sum_j w_j exp(s q_i k_j) v_j / sum_j w_j exp(s q_i k_j), over fine keys and means of tiles.

    Level 1: the keys of a query are the patches of the `topk` tiles whose mean key has the largest product with the
    mean query of its own tile (w = 1), and the mean keys and values of all tiles (w = patches of the tile).
    Level 2: tiles of edge x edge tiles. `topk2` large tiles are chosen in the same way, and `topk` tiles in them.
    The keys are the patches of the chosen tiles, the means of the tiles in the chosen large tiles, and the means of all
    large tiles. A query has topk edge^2 + N / edge^2 keys at level 1, and
    (topk + topk2) edge^2 + N / edge^4 keys at level 2.

    The paper's form is `edge=4, topk=8, part=None, exclusive=False`: there, a chosen tile keeps its mean, so that it
    counts twice. The defaults are ours; they were chosen on a trained model's maps. With `exclusive`, a chosen tile
    has no mean: with all tiles chosen, this is softmax attention. With `part`, each part x part square of a tile has a
    mean, and a tile is chosen if its means have large softmax weights for the mean queries of these squares. Tiles
    are nested squares in place of the Morton order of the official code, which is the same partition of maps whose
    sides are powers of two, and any map is taken. The official forward pass ignores the last means unless their number
    is a multiple of 64, and its backward pass for level 1 lacks a factor; neither holds here.

    Source: arXiv 2512.16615, section 3.

    Args:
        level: 1, 2, or "auto": 2 from 1024 tiles, which are 16384 patches with the paper's edge.
        topk: tiles whose patches are keys; None is the square root of the number of tiles.
        topk2: large tiles whose tiles are looked at, at level 2.
        edge: patches on a side of a tile; the paper's is 4.
        part: patches on a side of the squares in a tile that have means, at level 1; None for a mean of each tile.
        exclusive: whether a chosen tile has no mean.
        dense_up_to: maps up to this number of patches have softmax attention.
    """

    def __init__(
        self,
        host: Host,
        level: int | str = "auto",
        topk: int | None = None,
        topk2: int = 8,
        edge: int = 8,
        part: int | None = 4,
        exclusive: bool = True,
        dense_up_to: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host, dense_up_to)
        if level not in ("auto", 1, 2):
            raise InputError(f"level must be 1, 2 or 'auto', got {level!r}")
        self.topk = None if topk is None else arguments.whole(topk, "topk", 1)
        self.topk2, self.edge = arguments.whole(topk2, "topk2", 1), arguments.whole(edge, "edge", 2)
        self.part = None if part is None else arguments.whole(part, "part", 1)
        if self.part is not None and (self.edge % self.part or self.part == self.edge):
            raise InputError(f"part must divide edge, {self.edge}, and be smaller, or be None, got {part!r}")
        if self.part is not None and (level == 2 or not exclusive):
            raise InputError(f"part={part!r} is for level 1 and exclusive=True: set part=None")
        self.level, self.exclusive = 1 if self.part else level, exclusive

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        level = self.level
        if level == "auto":
            level = 1 if grid[0] * grid[1] < _MEANS * self.edge**2 else 2
        if self.part is not None:
            return self.edge, self.part
        return (self.edge,) if level == 1 else (self.edge**2, self.edge)

    def plan(self, tokens: Tokens) -> Plan:
        size, device = self.edge**2, tokens.query.device
        topk = self.topk or round((tokens.query.shape[2] // size) ** 0.5)
        if self.part is not None:
            parts, count = _Level(tokens, self.part**2, tokens.tiles.counts(self.part, device)), size // self.part**2
            chosen, rest = _best(parts.weights(count), topk)
            rest = (rest.unsqueeze(-1) * count + torch.arange(count, device=device)).flatten(-2)
            own = Segment("block", chosen, key_mask=tokens.real())
            return Plan([parts.means_and_front(rest, tokens), own], size, size)
        levels = [_Level(tokens, size, tokens.tiles.counts(self.edge, device))]
        if len(tokens.tiles.edges) == 2:
            levels.append(_Level(tokens, size**2, tokens.tiles.counts(self.edge**2, device)))
        segments = tokens.front()
        if len(levels) == 1:
            chosen, rest = _best(levels[0].scores(), topk)
        else:
            far, far_rest = _best(levels[1].scores(), self.topk2)
            near = (far.unsqueeze(-1) * size + torch.arange(size, device=device)).masked_fill(far.unsqueeze(-1) < 0, -1)
            near = near.flatten(-2)  # B heads large-tiles candidates
            chosen, rest = _best(levels[0].scores_of(near, size), topk)
            near, far, far_rest = (x.repeat_interleave(size, 2) for x in (near, far, far_rest))
            chosen, rest = (torch.where(x < 0, -1, near.gather(-1, x.clamp(min=0))) for x in (chosen, rest))
            segments.append(levels[1].means(far_rest if self.exclusive else None))
        if self.exclusive:
            segments.append(levels[0].means(rest))
        elif len(levels) == 1:
            segments.append(levels[0].means(None))
        else:
            segments.append(levels[0].means(far, "block"))
        segments.append(Segment("block", chosen, key_mask=tokens.real()))
        return Plan(segments, size, size)


class _Level:
    """The means of tiles of one size.

    Attributes:
        size: slots of a tile.
        counts: (tiles,) patches of each tile; None if all tiles are full.
    """

    def __init__(self, tokens: Tokens, size: int, counts: torch.Tensor | None):
        self.size, self.counts = size, counts
        self.query = tile_means(tokens.query.detach(), size, counts)  # a choice has no gradient
        self.key, self.value = tile_means(tokens.key, size, counts), tile_means(tokens.value, size, counts)

    def scores(self) -> torch.Tensor:
        """Products of all mean queries and mean keys (B, heads, tiles, tiles), -inf for tiles without patches."""
        found = self.query @ self.key.detach().transpose(-1, -2)
        return found if self.counts is None else found.masked_fill(self.counts == 0, -torch.inf)

    def weights(self, parts: int) -> torch.Tensor:
        """The weight that each tile has for each tile, if this level's means of its parts stand for it.

        Args:
            parts: means of this level in a tile.

        Returns:
            (B, heads, tiles, tiles).
        """
        scale, real = self.query.shape[-1] ** -0.5, None if self.counts is None else self.counts > 0
        found = []
        for query, key in zip(self.query.unbind(1), self.key.detach().unbind(1)):  # one head at a time, for memory
            logit = query @ key.transpose(-1, -2) * scale
            if self.counts is not None:
                logit = logit + self.counts.to(logit.dtype).log()
            weight = logit.softmax(-1)
            if real is not None:
                weight = weight * real.unsqueeze(-1)
            found.append(weight.unflatten(2, (-1, parts)).sum(-1).unflatten(1, (-1, parts)).sum(2))
        return torch.stack(found, 1)

    def scores_of(self, near: torch.Tensor, size: int) -> torch.Tensor:
        """Products of mean queries and chosen mean keys (B, heads, tiles, candidates).

        Args:
            near: (B, heads, large tiles, candidates) tiles, -1 for none.
            size: tiles of a large tile.
        """
        place = near.clamp(min=0)
        dim = self.key.shape[-1]
        key = (
            self.key.detach()
            .gather(2, place.flatten(2).unsqueeze(-1).expand(-1, -1, -1, dim))
            .unflatten(2, near.shape[2:])
        )
        found = self.query.unflatten(2, (-1, size)) @ key.transpose(-1, -2)
        hidden = near < 0
        if self.counts is not None:
            hidden = hidden | (self.counts[place] == 0)
        return found.masked_fill(hidden.unsqueeze(3), -torch.inf).flatten(2, 3)

    def means(self, index: torch.Tensor | None, unit: str = "token") -> Segment:
        """Means as keys that count as often as their patches: all, or the tiles or blocks of tiles of a list."""
        bias = math.log(self.size) if self.counts is None else self.counts.to(self.key.dtype).log()[None, None]
        return Segment("all" if index is None else unit, index, key=self.key, value=self.value, bias=bias)

    def means_and_front(self, index: torch.Tensor, tokens: Tokens) -> Segment:
        """The means of a list and the tokens in front in one segment, which costs less than two."""
        means, front = self.key.shape[2], tokens.front_key.shape[2]
        if not front:
            return self.means(index)
        more = torch.arange(means, means + front, device=index.device).expand(*index.shape[:3], -1)
        counts = self.key.new_full((means,), self.size) if self.counts is None else self.counts.to(self.key.dtype)
        return Segment(
            "token",
            torch.cat([index, more], -1),
            key=torch.cat([self.key, tokens.front_key], 2),
            value=torch.cat([self.value, tokens.front_value], 2),
            bias=torch.cat([counts.log(), counts.new_zeros(front)])[None, None],
        )


def _best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the `count` largest scores of each row, largest first, and of the others; -1 where it is -inf."""
    found, order = ranked(scores)
    order = order.masked_fill(found == -torch.inf, -1)
    return order[..., :count], order[..., count:]

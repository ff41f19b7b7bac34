"""The base of mixers that choose keys: a selector makes a plan, and block-sparse attention computes it."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from terrazzo.backbones._checks import number
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer, softmax_attention
from terrazzo.backbones.mixers._tiles import Tiles
from terrazzo.errors import InputError
from terrazzo.kernels.block_sparse_attention import Plan, Segment, block_sparse_attention
from terrazzo.kernels.dispatch import arguments
from terrazzo.kernels.dispatch.exporting import is_exporting


class Tokens(NamedTuple):
    """What a selector plans for: patches in the order of tiles, and the tokens in front of them apart.

    Attributes:
        query, key, value: (B, heads, slots, D), a slot without a patch holds zeros.
        front_key, front_value: (B, heads, prefix, D).
        tiles: the tiles of the map.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    front_key: torch.Tensor
    front_value: torch.Tensor
    tiles: Tiles

    def real(self) -> torch.Tensor | None:
        """Which slots hold a patch, (1, slots) bool, as the mask of a segment; None if all do."""
        found = self.tiles.real(self.query.device)
        return None if found is None else found[None]

    def front(self) -> list[Segment]:
        """The tokens in front as keys of every query."""
        if not self.front_key.shape[2]:
            return []
        return [Segment("all", key=self.front_key, value=self.front_value)]


class Selector(Mixer):
    """Attention of tiles of patches to keys that the mechanism chooses for each of them.

    Tokens in front (class token, registers) are keys of every query, and their own queries attend to all tokens.
    A subclass implements `plan` and `edges`, and, if its thresholds or budgets depend on the model, `calibrate`.

    Attributes:
        dense_up_to: maps up to this number of patches have softmax attention.
        plans_layer: whether a plan is about all heads of the layer, and lists the layer's own keys.
    """

    open_sizes = False
    plans_layer = True

    def __init__(self, host: Host, dense_up_to: int = 0):
        super().__init__(host)
        self.dense_up_to = arguments.whole(dense_up_to, "dense_up_to", 0)

    def edges(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Sides of the tiles of a map; see `Tiles`."""
        raise NotImplementedError

    def plan(self, tokens: Tokens) -> Plan:
        """The keys of every tile. Indices have no gradient; keys that it derives, and biases, have."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what `calibrate` found, where the mixer has it."""

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        if grid[0] * grid[1] <= self.dense_up_to:
            return f"the map has no more than {self.dense_up_to} patches"
        return None

    def tokens(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> Tokens:
        """The tokens (B, heads, N, D) of a call as `plan` takes them."""
        tiles = Tiles(place.grid, self.edges(place.grid))
        arranged = (tiles.arrange(x[:, :, place.prefix :]) for x in (query, key, value))
        return Tokens(*arranged, key[:, :, : place.prefix], value[:, :, : place.prefix], tiles)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        tokens = self.tokens(query, key, value, place)
        out, _ = block_sparse_attention(tokens.query, tokens.key, tokens.value, self.plan(tokens))
        out = tokens.tiles.restore(out)
        if not place.prefix:
            return out
        return torch.cat([softmax_attention(query[:, :, : place.prefix], key, value, place), out], 2)

    @torch.no_grad()
    def density(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> float:
        """The part of all pairs of a patch and a token that the mixer computes, derived keys included."""
        if self.dense(place.grid, place.prefix) is not None:
            return 1.0
        tokens = self.tokens(query, key, value, place)
        order = tokens.tiles.order(query.device)[None, None]
        plan = dataclasses.replace(self.plan(tokens), query_order=order)
        pairs = plan.density(tokens.query, tokens.key) * len(order[0, 0]) ** 2
        return pairs / ((key.shape[2] - place.prefix) * key.shape[2])


def listed(kept: torch.Tensor) -> torch.Tensor:
    """The places of True in each row, in ascending order: (..., units) bool to (..., L) int32, filled with -1.

    L is the largest number of them on a CPU, and otherwise the number of units, so that the host need not wait.
    """
    units = kept.shape[-1]
    length = max(1, int(kept.sum(-1).amax())) if _is_known(kept) else units
    place = torch.where(kept, kept.cumsum(-1) - 1, length)
    own = torch.arange(units, dtype=torch.int32, device=kept.device).expand_as(kept)
    index = torch.full((*kept.shape[:-1], length + 1), -1, dtype=torch.int32, device=kept.device)
    return index.scatter(-1, place, own)[..., :length]


def ranked(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of each row in descending order, and the place of each; among equals, the lowest place comes first.

    ONNX has no stable sort, but its sort (TopK) puts the lowest place first.
    """
    if is_exporting():
        return scores.sort(dim=-1, descending=True)
    return scores.sort(dim=-1, descending=True, stable=True)


def _is_known(x: torch.Tensor) -> bool:
    """Whether shapes may depend on the numbers in `x`."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting() or isinstance(x, FakeTensor)
    return x.device.type == "cpu" and not traced


def positive(name: str, value: Any) -> float:
    """Check an option that is a number above 0.

    Raises:
        InputError: `value` is not a number above 0.
    """
    found = number(name, value)
    if found <= 0:
        raise InputError(f"{name} must be above 0, got {value!r}")
    return float(found)


def tile_means(x: torch.Tensor, size: int, counts: torch.Tensor | None) -> torch.Tensor:
    """Means over the patches of each tile: (B, heads, slots, D) to (B, heads, slots / size, D).

    Args:
        size: slots of a tile. Slots without a patch hold zeros.
        counts: (tiles,) patches of each tile; None if all tiles are full.
    """
    x = x.unflatten(2, (-1, size))
    if counts is None:
        return x.mean(3)
    return (x.sum(3) / counts.clamp(min=1).unsqueeze(-1)).to(x.dtype)

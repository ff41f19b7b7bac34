"""How much of dense attention the mixers of a model select: pairs of queries and keys, and softmax weights.

Pairs are counted by mixers with a method `density(query, key, value, place)`, weights by selectors, which have plans.
"""

import contextlib
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers import Mixer
from terrazzo.backbones.mixers._selector import Selector
from terrazzo.kernels.block_sparse_attention import Plan

SAMPLED = 64
"""Patches whose softmax weights are computed, spread evenly over the map."""


class Coverage:
    """Figures of all calls of a model's mixers."""

    def __init__(self):
        self.densities: list[float] = []
        self.masses: list[float] = []

    @property
    def density(self) -> float | None:
        """Selected pairs / (queries x keys), the mean over layers and pictures; None if no mixer selects."""
        return statistics.mean(self.densities) if self.densities else None

    @property
    def mass(self) -> float | None:
        """The part of the dense softmax weights that is on selected keys, the mean over sampled queries and heads.

        Tokens in front count as selected. Keys that the mixer derives (means of tiles) cover nothing. None if no mixer
        selects, or if no mixer's plans say which of the layer's keys.
        """
        return statistics.mean(self.masses) if self.masses else None

    def count(self, mixer: Mixer, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Place]) -> None:
        """Count one call of a mixer: a hook in front of its forward."""
        self.densities.append(mixer.density(*given))
        if isinstance(mixer, Selector) and mixer.plans_layer:
            self.masses.append(mass_of(mixer, *given))


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Coverage]:
    """Inside this context, what the mixers of a model select is counted at each forward pass."""
    found = Coverage()
    mixers = [module for module in model.modules() if isinstance(module, Mixer) and hasattr(module, "density")]
    hooks = [mixer.register_forward_pre_hook(found.count) for mixer in mixers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def mass_of(
    mixer: Selector, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, sampled: int = SAMPLED
) -> float:
    """The part of dense softmax weights that a selector's plan covers, for some patches; see `Coverage.mass`."""
    if mixer.dense(place.grid, place.prefix) is not None:
        return 1.0
    tokens = mixer.tokens(query, key, value, place)
    order = tokens.tiles.order(query.device)
    filled = (order >= 0).nonzero()[:, 0]
    slots = torch.empty_like(filled).scatter(0, order[filled], filled)  # the slot of each patch
    patches = torch.linspace(0, len(slots) - 1, min(sampled, len(slots)), device=query.device).long()
    weights = softmax_weights(query[:, :, place.prefix + patches], key, place)
    covered = selected(mixer.plan(tokens), slots[patches], tokens.query, tokens.key)[..., slots]
    front, rest = weights.tensor_split([place.prefix], -1)
    return (front.sum(-1) + (rest * covered).sum(-1)).mean().item()


def softmax_weights(query: torch.Tensor, key: torch.Tensor, place: Place) -> torch.Tensor:
    """The weights (B, heads, S, N) that softmax attention gives keys (B, heads, N, D), for queries (B, heads, S, D)."""
    logits = query.float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5
    bias = place.mask(torch.float32)
    return (logits if bias is None else logits + bias).softmax(-1)


def selected(plan: Plan, sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Which of the layer's keys a plan selects for some queries: (B, heads, S, N) bool.

    Args:
        plan: a plan for all queries and keys.
        sample: (S,) indices of queries.
        query, key: (B, heads, N, D).
    """
    batch, heads, keys, _ = key.shape
    tiles = _tiles(plan, sample, batch, heads)  # B heads S R
    found = torch.zeros(batch, heads, len(sample), keys, dtype=torch.bool, device=key.device)
    for segment in plan.segments:
        if segment.key is not None:
            continue
        if segment.unit == "all":
            part = (tiles >= 0).any(-1, keepdim=True).expand_as(found)
        else:
            width = 1 if segment.unit == "token" else plan.key_tile
            index = segment.listed().long()
            index = index.expand(batch, heads, *index.shape[2:])
            row = tiles.clamp(min=0, max=index.shape[2] - 1).flatten(2).unsqueeze(-1)  # B heads SR 1
            listed = index.gather(2, row.expand(-1, -1, -1, index.shape[3])).unflatten(2, tiles.shape[2:])
            listed = listed.masked_fill(tiles.unsqueeze(-1) < 0, -1).flatten(3)
            units = -(-keys // width)
            part = torch.zeros(batch, heads, len(sample), units + 1, dtype=torch.bool, device=key.device)
            part = part.scatter(3, torch.where(listed < 0, units, listed), True)[..., :units]
            part = part.repeat_interleave(width, 3)[..., :keys]
        if segment.key_mask is not None:
            part = part & segment.key_mask[:, None, None]
        found |= part
    return found


def _tiles(plan: Plan, sample: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """The tiles in which each sampled query stands: (B, heads, S, R), -1 where it stands in fewer than R."""
    if plan.query_order is None:
        return (sample // plan.query_tile).expand(batch, heads, -1).unsqueeze(-1)
    order = plan.query_order.expand(batch, heads, -1).unsqueeze(2)
    here = order == sample[:, None]  # B heads S slots
    most = max(1, int(here.sum(-1).max()))
    held, slots = here.int().topk(most)
    return torch.where(held > 0, slots // plan.query_tile, -1)

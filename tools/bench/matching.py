"""Options with which a token reducer brings a model to given multiply-adds: found by counting, without computing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from terrazzo.backbones._reduce import reduce
from terrazzo.backbones.reducers import reducer_class
from terrazzo.errors import InputError
from terrazzo.tools.inspect.maps import maps_at
from terrazzo.tools.inspect.trace import meta_outputs

_STEPS = 16
CLOSE = 0.005
"""A share of the multiply-adds that is hit."""


class LastMap(nn.Module):
    """The pass of a model that gives its last map, (B, C, h, w)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return maps_at(self.model, x, 1, norm=True)[-1]


class Matcher:
    """Finds options for one model and one size of image. It remembers what it counted.

    Args:
        model: a plain ViT of timm on the meta device; its reducer is replaced.
        size: (H, W) of the images.
        maps: whether the pass that gives the last map counts, and not the pass that classifies.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], maps: bool = False):
        self.model, self.size, self.maps = model, size, maps
        self._tried: dict[str, dict[float, tuple[dict[str, Any], float]]] = {}
        self.whole = self.macs("mctf", {"r": 0})

    def macs(self, method: str, options: Mapping[str, Any]) -> int:
        """The multiply-adds of a pass with a reducer, as `tools.inspect.measure` counts them."""
        model = reduce(self.model, method, **options)
        with FlopCounterMode(display=False) as flops:
            meta_outputs(LastMap(model) if self.maps else model, self.size)
        return flops.get_total_flops() // 2

    def options(self, method: str, fixed: Mapping[str, Any], share: float) -> tuple[dict[str, Any], float]:
        """The options whose share of the multiply-adds is nearest to `share`, and their share.

        Args:
            fixed: options that stay as they are.

        Raises:
            InputError: the method does not fit the model, or cannot save as much.
        """
        tried = self._tried.setdefault(f"{method} {fixed}", {0.0: ({}, 1.0)})

        def distance(strength: float) -> float:
            return abs(tried[strength][1] - share)

        self._try(method, fixed, 1.0)
        if tried[1.0][1] > share + CLOSE:
            raise InputError(f"{tried[1.0][1]:.0%} of the multiply-adds is the least that this method leaves")
        for step in range(_STEPS):
            # The reduction at a strength of 0 is none, whatever options are fixed.
            best = min((strength for strength in tried if strength > 0), key=distance)
            if distance(best) <= CLOSE:
                break
            low = max(strength for strength, (_, found) in tried.items() if found > share)
            high = min(strength for strength, (_, found) in tried.items() if found <= share and strength > low)
            # Where a straight line says, and at times in the middle, so that both ends move.
            part = (tried[low][1] - share) / (tried[low][1] - tried[high][1])
            part = 0.5 if step % 3 == 2 else min(0.95, max(0.05, part))
            self._try(method, fixed, low + (high - low) * part)
        return tried[best]

    def _try(self, method: str, fixed: Mapping[str, Any], strength: float) -> None:
        tried = self._tried[f"{method} {fixed}"]
        if strength not in tried:
            made = reducer_class(method).of_strength(strength, len(self.model.blocks))
            options = {key: _short(value) for key, value in made.items()} | dict(fixed)
            tried[strength] = options, self.macs(method, options) / self.whole


def _short(value: Any) -> Any:
    """Fractions with four digits, so that options can be read and typed."""
    if isinstance(value, float):
        return round(value, 4)
    return tuple(_short(item) for item in value) if isinstance(value, tuple) else value

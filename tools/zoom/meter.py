"""What a zoom costs while a model is evaluated: megapixels, spared pictures, milliseconds."""

import time
from typing import Any

import torch

from terrazzo.gated_zoom import Look, Zoom


class Meter:
    """Counts the pictures of a zoom.

    Attributes:
        megapixels: For each picture, coarse pass and crops with halos.
        gated: For each picture whether the gate spared the fine pass.
        full: For each picture the megapixels of a full pass.
        seconds: Of all passes and heads.
    """

    def __init__(self, zoom: Zoom):
        self.megapixels: list[float] = []
        self.full: list[float] = []
        self.gated: list[bool] = []
        self.seconds = 0.0
        self.began = 0.0
        zoom.on_look = self._count
        zoom.register_forward_pre_hook(self._begin)
        zoom.register_forward_hook(self._end)

    def record(self) -> dict[str, float]:
        """Means over the pictures, by name; empty without a picture."""
        count = len(self.megapixels)
        if not count:
            return {}
        return {
            "megapixels per picture": sum(self.megapixels) / count,
            "share of a full pass (%)": 100 * sum(self.megapixels) / sum(self.full),
            "gated off (%)": 100 * sum(self.gated) / count,
            "ms per picture": 1000 * self.seconds / count,
        }

    def _count(self, look: Look) -> None:
        self.megapixels += look.megapixels
        self.full += [look.grid.height * look.grid.width / 1e6] * len(look.tiles)
        self.gated += look.gated

    def _begin(self, module: Any, args: Any) -> None:
        _finish()
        self.began = time.perf_counter()

    def _end(self, module: Any, args: Any, output: Any) -> None:
        _finish()
        self.seconds += time.perf_counter() - self.began


def _finish() -> None:
    """Wait for a GPU, which computes beside the program."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

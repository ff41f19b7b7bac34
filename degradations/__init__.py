"""How pictures are made worse for restoration, on the fly, and how far a restored picture is from the truth.

A degradation is called as `degrade(clean, generator)`: from a clean picture (3, H, W) in 0..1 to a degraded picture
(3, H / scale, W / scale). All its random numbers come from the generator. It has these attributes:

- `task`: super-resolution, denoising, deraining or dehazing;
- `scale`: how many times smaller the degraded picture is; H and W are multiples of it;
- `reach`: how many pixels of the clean picture around a window decide about the degraded window; None if a window
  differs with its place in the picture, so that the whole picture must be degraded.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from terrazzo._settings import built
from terrazzo.degradations.bicubic import Bicubic
from terrazzo.degradations.haze import Haze
from terrazzo.degradations.noise import GaussianNoise
from terrazzo.degradations.rain import Rain

__all__ = ["Bicubic", "Degradation", "GaussianNoise", "Haze", "Rain", "degradation_of"]

KINDS = {kind.__name__: kind for kind in (Bicubic, GaussianNoise, Rain, Haze)}
"""The degradations by the names that configs give as `type`."""


class Degradation(Protocol):
    """Makes clean pictures worse; see the package."""

    task: str
    scale: int
    reach: int | None

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """From (3, H, W) in 0..1 to (3, H / scale, W / scale)."""
        ...


def degradation_of(settings: Mapping[str, Any]) -> Degradation:
    """Build a degradation.

    Args:
        settings: `type`, one of `KINDS`, and its arguments.

    Raises:
        InputError: the type or an argument is unknown, or an argument is missing or has no meaning.
    """
    return built("degradation", KINDS, settings)

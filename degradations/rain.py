"""Streaks of rain: noise blurred along the direction of the fall, laid over the picture."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from terrazzo.degradations.noise import drawn, span
from terrazzo.degradations.pixels import in_8_bits


class Rain:
    """Lays bright streaks of one direction over a picture, in steps of 1/255.

    The streaks S are scattered drops of random brightness, each smeared along a line: the recipe of the synthetic sets
    of Fu et al. ("Removing rain from single images via a deep detail network", CVPR 2017), whose rain is motion-blurred
    noise. They join the picture B by the screen blend of Luo, Xu and Ji ("Removing rain from a single image via
    discriminative sparse coding", ICCV 2015): 1 - (1 - B)(1 - S), which is B + S in the dark and never above 1. Each
    number is drawn between two bounds for each picture.

    Args:
        density: drops for each pixel.
        length: pixels of a streak.
        angle: degrees from the vertical.
        strength: S at the brightest place of a streak.

    Raises:
        InputError: a bound has no meaning.
    """

    task = "deraining"
    scale = 1
    reach = 0

    def __init__(
        self,
        density: float | Sequence[float] = (0.002, 0.01),
        length: float | Sequence[float] = (12, 30),
        angle: float | Sequence[float] = (-25, 25),
        strength: float | Sequence[float] = (0.4, 0.9),
    ):
        self.density = span("density of Rain", density, 0, 1)
        self.length = span("length of Rain", length, 1, 200)
        self.angle = span("angle of Rain", angle, -90, 90)
        self.strength = span("strength of Rain", strength, 0, 1)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """From (3, H, W) to the same size."""
        density, length, angle, strength = (
            drawn(pair, generator) for pair in (self.density, self.length, self.angle, self.strength)
        )
        kernel = _streak(length, math.radians(angle))
        margin = len(kernel) // 2
        size = [side + 2 * margin for side in clean.shape[-2:]]  # drops beyond the picture reach into it, too
        drops = (torch.rand(size, generator=generator) < density).float()
        drops *= 0.5 + 0.5 * torch.rand(size, generator=generator)
        streaks = strength * conv2d(drops[None, None], kernel[None, None])[0].clamp(max=1)
        return in_8_bits(1 - (1 - clean) * (1 - streaks))


def _streak(length: float, angle: float) -> Tensor:
    """A streak, (n, n) with an odd n: 1 along its middle, and Gaussian across it with a deviation of 0.7 pixels."""
    half = math.ceil(length / 2) + 2
    rows, columns = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = columns * math.cos(angle) - rows * math.sin(angle)
    ends = (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return ends * torch.exp(-(across**2) / (2 * 0.7**2))

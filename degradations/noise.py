"""White Gaussian noise, as benchmarks of denoising add it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from terrazzo.errors import InputError


class GaussianNoise:
    """Adds independent normal noise to each value; it is neither rounded nor cut off, as in DnCNN (arXiv 1608.03981).

    Args:
        sigma: the standard deviation for values in 0..255; or the least and the greatest, of which each picture draws
            a value between (DnCNN-B trains on 0 to 55).

    Raises:
        InputError: sigma is negative, or the greatest is less than the least.
    """

    task = "denoising"
    scale = 1
    reach = 0

    def __init__(self, sigma: float | Sequence[float]):
        self.sigma = span("sigma of GaussianNoise", sigma)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """From (3, H, W) to the same size."""
        sigma = drawn(self.sigma, generator) / 255
        return clean + sigma * torch.randn(clean.shape, generator=generator)


def span(what: str, value: float | Sequence[float], least: float = 0.0, most: float = float("inf")) -> tuple:
    """A number, or two rising numbers, as two numbers.

    Args:
        what: what messages call it.
        least, most: the numbers that have a meaning.

    Raises:
        InputError: it is something else.
    """
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if (
        len(pair) != 2
        or not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in pair)
        or not all(map(math.isfinite, pair))
        or not (least <= pair[0] <= pair[1] <= most)
    ):
        limit = f"{least:g} to {most:g}" if most < float("inf") else f"at least {least:g}"
        raise InputError(f"the {what} is {value!r}; it must be a number, or two rising numbers, {limit}")
    return float(pair[0]), float(pair[1])


def drawn(pair: tuple[float, float], generator: torch.Generator) -> float:
    """A number between two numbers, all equally likely."""
    return pair[0] + (pair[1] - pair[0]) * float(torch.rand((), generator=generator))

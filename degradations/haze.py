"""Haze by the model of atmospheric scattering."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from terrazzo.degradations.noise import drawn, span
from terrazzo.degradations.pixels import in_8_bits


class Haze:
    """Veils a picture J as far-away things are veiled: J t + A (1 - t) with t = exp(-beta d), in steps of 1/255.

    The model is Koschmieder's, as Narasimhan and Nayar write it ("Vision and the atmosphere", IJCV 48(3), 2002). The
    bounds of the airlight A and of beta are RESIDE's (arXiv 1712.04143). RESIDE knows the depth d of its
    pictures. A folder of pictures has no depth, so d is made up: half a plane that recedes to the upper edge, half a
    smooth random field, together 0 to 1. The veil is right, and its place in the picture is not.

    Args:
        beta: the scattering coefficient, drawn between two bounds for each picture.
        airlight: A, drawn between two bounds for each colour.

    Raises:
        InputError: a bound has no meaning.
    """

    task = "dehazing"
    scale = 1
    reach = None  # the depth spans the whole picture

    def __init__(self, beta: float | Sequence[float] = (0.6, 1.8), airlight: float | Sequence[float] = (0.7, 1.0)):
        self.beta = span("beta of Haze", beta)
        self.airlight = span("airlight of Haze", airlight, 0, 1)

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """From (3, H, W) to the same size."""
        beta = drawn(self.beta, generator)
        airlight = torch.tensor([drawn(self.airlight, generator) for _ in range(3)])[:, None, None]
        size = list(clean.shape[-2:])
        field = interpolate(torch.rand(1, 1, 4, 4, generator=generator), size, mode="bilinear", align_corners=True)[0]
        depth = 0.5 * torch.linspace(1, 0, size[0])[:, None] + 0.5 * field
        transmission = torch.exp(-beta * depth)
        return in_8_bits(clean * transmission + airlight * (1 - transmission))

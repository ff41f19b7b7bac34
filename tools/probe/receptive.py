"""Effective receptive fields: which pixels the middle of a map depends on, by the energy of its gradient.

W. Luo and others, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
section 2. They take the gradient of one channel; here random signs weight all channels, so that the mean of the squared
gradient is the squared norm of the whole Jacobian.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.inspect.maps import maps_at

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Field:
    """An effective receptive field.

    Attributes:
        energy: (H, W), the mean squared gradient by pixel; it sums to 1.
        stride: pixels from one position of the map to the next.
    """

    energy: np.ndarray
    stride: float

    @property
    def middle(self) -> tuple[float, float]:
        """(y, x) in pixels: half of the energy is above, and half is left of it.

        The map's grid does not tell it: padded convolutions with strides shift positions against pixels.
        """
        sums = self.energy.sum(1), self.energy.sum(0)
        return tuple(float(np.interp(0.5, np.append(0, along.cumsum()), np.arange(len(along) + 1))) for along in sums)

    def radii(self, shares: Iterable[float] = SHARES) -> dict[float, float]:
        """For each share of the energy, the radius in pixels of the smallest disc around the middle that holds it.

        The disc is cut off at the image's border, and so is the energy.
        """
        rows, columns = (np.arange(count) + 0.5 for count in self.energy.shape)
        distances = np.hypot(rows[:, None] - self.middle[0], columns[None] - self.middle[1]).ravel()
        order = distances.argsort(kind="stable")
        held = self.energy.ravel()[order].cumsum()
        found = np.searchsorted(held, [share * held[-1] for share in shares])
        return {share: float(distances[order[index]]) for share, index in zip(shares, found)}


def receptive_field(
    model: nn.Module,
    images: Iterable[torch.Tensor],
    level: int = -1,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> Field:
    """The effective receptive field of the middle position of a map.

    Args:
        model: of timm, in evaluation mode; its weights get no gradients.
        images: tensors (1, 3, H, W) of one size; the energy is the mean over them.
        level: which map; -1 is the last.
        seed: of the channels' signs.
        done: called after each image.

    Raises:
        InputError: the model gives no maps, has no such level, cannot take these images, or has no finite gradient.
    """
    signs = torch.Generator().manual_seed(seed)
    total: np.ndarray | None = None
    for image in images:
        image = image.detach().requires_grad_()
        (found,) = maps_at(model, image, [level])
        _, channels, height, width = found.shape
        weights = (torch.randint(2, (channels,), generator=signs) * 2 - 1).to(found)
        # In double precision, because the squares of far pixels' gradients vanish in single precision.
        (gradient,) = torch.autograd.grad((found[0, :, height // 2, width // 2] * weights).sum(), image)
        energy = gradient[0].double().square().sum(0).cpu().numpy()
        total = energy if total is None else total + energy
        done()
    if total is None or not np.isfinite(total).all() or not total.sum():
        raise InputError("the gradient of the map's middle is zero or not finite")
    return Field(total / total.sum(), total.shape[0] / height)


def table(fields: Mapping[str, Mapping[float, float]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: `Field.radii` of each model, the smallest field first."""
    head = ("model", *(f"{share:.0%} of the energy, px" for share in SHARES))
    names = sorted(fields, key=lambda name: fields[name][SHARES[1]])
    return head, [(name, *(f"{fields[name][share]:.0f}" for share in SHARES)) for name in names]

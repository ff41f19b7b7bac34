"""How far a model looks: measured, so that tiles with enough overlap give the result of the whole picture."""

from collections.abc import Callable

import torch
from torch import Tensor

_TOLERANCE = 1e-3
"""Relative to the largest logit: rounding errors are smaller, the effect of a changed pixel is larger."""


def measured_reach(logits: Callable[[Tensor], Tensor], tile: int, stride: int, channels: int = 3) -> int | None:
    """The distance from a tile's edge beyond which results do not depend on what lies outside the tile.

    A frame of NaN, one stride wide, is laid into a tile of noise. NaN spreads through sums, products and maxima, also
    where a weight is small, so all other results are clean. Then the same noise is cut at another multiple of the
    stride: results may depend on where a tile begins, for example through windows or position embeddings.

    Args:
        logits: from (B, channels, tile, tile) to (B, classes, tile, tile).
        tile: pixels, a multiple of the stride.
        stride: the model's largest stride.
        channels: of the model's input.

    Returns:
        Pixels, a multiple of the stride; None if the model looks so far that no pixels of the tile are left to compare,
        or if results depend on where a tile begins.
    """
    side = tile + stride
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    plain = logits(noise[:, :, :tile, :tile])
    close = _TOLERANCE * float(plain.abs().max())
    framed = torch.full((1, channels, tile, tile), torch.nan)
    inner = slice(stride, tile - stride)
    framed[:, :, inner, inner] = noise[:, :, inner, inner]
    clean = ((logits(framed) - plain).abs() <= close).all(1)[0]  # a comparison with NaN is false
    del framed
    furthest = (tile - 2 * stride) // 2
    middle = next((reach for reach in range(stride, furthest + 1, stride) if _all_inside(clean, reach)), None)
    if middle is None:
        return None
    moved = logits(noise[:, :, stride:, stride:])
    one = plain[:, :, middle + stride : tile - middle, middle + stride : tile - middle]
    other = moved[:, :, middle : tile - middle - stride, middle : tile - middle - stride]
    return middle if bool(((one - other).abs() <= close).all()) else None


def _all_inside(clean: Tensor, reach: int) -> bool:
    return bool(clean[reach : clean.shape[0] - reach, reach : clean.shape[1] - reach].all())

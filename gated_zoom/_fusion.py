"""Coarse and fine logits become one map."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from terrazzo.gated_zoom._tiles import Grid, Window


def reduced(images: Tensor, scale: float) -> Tensor:
    """Images (B, C, H, W) for the coarse pass, with 1 / scale of the sides, rounded up."""
    size = [max(1, -int(-side // scale)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, h, w) in another size, (B, C, *size)."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear")


def fuse(
    coarse: Tensor,
    fine: Sequence[Tensor],
    grid: Grid,
    chosen: Sequence[int],
    refinement: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Replace coarse logits inside of the chosen tiles, and blend both in the halos around them.

    A pixel of a chosen tile gets the tile's own fine logits. Elsewhere fine logits count by a ramp, which falls from 1
    at the border of the tile to 0 at the end of the halo. Where halos overlap, fine logits are averaged by their ramps.

    Args:
        coarse: (C, H, W), the enlarged logits of the coarse pass.
        fine: N logits (C, h, w) of the crops.
        grid: The tiles.
        chosen: N indices of tiles.
        refinement: Corrects the result, from coarse logits, fused logits and ramp (1, H, W); None for nothing.

    Returns:
        (C, H, W); `coarse` itself if no tile is chosen.
    """
    if not len(chosen):
        return coarse
    total, weights, highest = torch.zeros_like(coarse), torch.zeros_like(coarse[:1]), torch.zeros_like(coarse[:1])
    for index, logits in zip(chosen, fine):
        crop = grid.crop(index)
        where = (..., *crop.slices)
        ramp = _ramp(grid.inner(index), crop, grid.halo).to(coarse)
        total[where] += ramp * logits
        weights[where] += ramp
        highest[where] = torch.maximum(highest[where], ramp)
    out = torch.where(weights > 0, torch.lerp(coarse, total / weights.clamp(min=1e-6), highest), coarse)
    for index, logits in zip(chosen, fine):
        inner, crop = grid.inner(index), grid.crop(index)
        out[(..., *inner.slices)] = logits[(..., *_inside(inner, crop).slices)]
    return out if refinement is None else refinement(coarse, out, highest)


def _inside(inner: Window, crop: Window) -> Window:
    """The place of a tile in its crop."""
    top, left = inner.top - crop.top, inner.left - crop.left
    return Window(top, left, top + inner.bottom - inner.top, left + inner.right - inner.left)


def _ramp(inner: Window, crop: Window, halo: int) -> Tensor:
    """Weights of a crop's pixels, (h, w): 1 in the tile, falling to 0 within the halo."""
    down = _fall(inner.top, inner.bottom, crop.top, crop.bottom, halo)
    across = _fall(inner.left, inner.right, crop.left, crop.right, halo)
    return torch.minimum(down[:, None], across)


def _fall(start: int, end: int, first: int, last: int, halo: int) -> Tensor:
    """Weights along a side for the pixels `first` to `last`, of a tile from `start` to `end`."""
    centre = torch.arange(first, last) + 0.5
    outside = torch.maximum(start - centre, centre - end).clamp(min=0)
    return (1 - outside / max(halo, 1)).clamp(min=0) if halo else (outside == 0).float()

"""PyTorch's resizes by a factor."""

import torch
from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._operators import resize
from terrazzo.spatial._part import Part


def _check(module: nn.Upsample) -> str | None:
    return None if module.scale_factor is not None else "a fixed size; give a scale_factor"


def _upsample(part: Part, module: nn.Upsample, x: torch.Tensor) -> torch.Tensor:
    level = part.level(x)
    factor = module.scale_factor
    factors = (factor, factor) if isinstance(factor, (int, float)) else tuple(factor)
    size = (int(level.height * factors[0]), int(level.width * factors[1]))
    scales = None if module.recompute_scale_factor else factors
    return resize(part, x, size, module.mode, module.align_corners, scales)


ENTRIES = {
    "Upsample": Entry(_upsample, check=_check),
    "UpsamplingNearest2d": Entry(_upsample, check=_check),
    "UpsamplingBilinear2d": Entry(_upsample, check=_check),
}

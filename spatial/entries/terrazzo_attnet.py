"""AttNet: depthwise convolutions whose kernels come from means over the whole map."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import cells
from terrazzo.kernels.dispatch.dtypes import accumulator, without_autocast
from terrazzo.spatial._entries import OWN, Entry
from terrazzo.spatial._part import Part


def _mix(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    level = part.level(x)
    first, last = (row * level.width for row in level.rows[part.rank])
    wide = x.flatten(2).to(accumulator(x))
    with without_autocast(x):
        own = cells(module.taps, level.height * level.width, wide)[:, first:last]
        means = part.total(wide @ own.t())
    kernels = module.kernels_of(means.to(x.dtype))
    side = math.isqrt(module.taps)
    around = side // 2
    value = module.x_proj(x)
    rows = part.exchange(value, 2, level, [(start - around, end + around) for start, end in level.rows])
    weight = kernels.to(value.dtype).flatten(0, 1).unflatten(1, (1, side, side))
    y = F.conv2d(rows.flatten(0, 1)[None], weight, padding=(0, around), groups=len(weight))
    return module.proj(y.view(value.shape))


_OWN = ("AttNet", "Block", "GatedMlp", "WideRmsNorm2d", "NormedHead")
ENTRIES = {**dict.fromkeys(_OWN, OWN), "AttentiveConv": Entry(_mix)}

"""PyTorch's pools."""

import torch
from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._operators import adaptive_average, average_pool, greatest, max_pool, pair
from terrazzo.spatial._part import Part


def _check_max(module: nn.MaxPool2d) -> str | None:
    return "returns indices, which count positions in a rank's rows" if module.return_indices else None


def _check_adaptive(module: nn.AdaptiveAvgPool2d) -> str | None:
    return "an output size None keeps a side" if None in pair(module.output_size) else None


def _check_global(module: nn.AdaptiveMaxPool2d) -> str | None:
    return None if pair(module.output_size) == (1, 1) and not module.return_indices else "more than one maximum"


def _adaptive(part: Part, module: nn.AdaptiveAvgPool2d, x: torch.Tensor) -> torch.Tensor:
    size = pair(module.output_size)
    if size != (1, 1):
        return adaptive_average(part, x, size)
    found = part.mean(x)
    part.whole(1, 1)
    return found


def _greatest(part: Part, module: nn.AdaptiveMaxPool2d, x: torch.Tensor) -> torch.Tensor:
    found = greatest(part, x)
    part.whole(1, 1)
    return found


def _max(part: Part, module: nn.MaxPool2d, x: torch.Tensor) -> torch.Tensor:
    return max_pool(part, module, x)


ENTRIES = {
    "MaxPool2d": Entry(_max, check=_check_max),
    "AvgPool2d": Entry(average_pool),
    "AdaptiveAvgPool2d": Entry(_adaptive, check=_check_adaptive),
    "AdaptiveMaxPool2d": Entry(_greatest, check=_check_global),
}

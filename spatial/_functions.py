"""Functions of PyTorch that a module's own code calls with local sizes: they get the sizes of whole maps."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from terrazzo.errors import InputError
from terrazzo.spatial._operators import max_pool, resize
from terrazzo.spatial._part import Part


def _interpolate(
    part: Part,
    x: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """`F.interpolate`; a size is that of the rank's part of a known map."""
    if antialias:
        mode = f"{mode} with antialiasing"
    if size is not None:
        wanted = part.of_size(*(int(side) for side in size))
        return resize(part, x, (wanted.height, wanted.width), mode, align_corners)
    level = part.level(x)
    factors = (scale_factor,) * 2 if isinstance(scale_factor, (int, float)) else tuple(scale_factor)
    whole = (int(level.height * factors[0]), int(level.width * factors[1]))
    return resize(part, x, whole, mode, align_corners, None if recompute_scale_factor else factors)


def _max_pool(
    part: Part,
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor:
    options = SimpleNamespace(
        kernel_size=kernel_size, stride=stride or None, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )
    return max_pool(part, options, x)  # type: ignore[arg-type]


FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.interpolate: _interpolate,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
}
REFUSED = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.roll, torch.flip, torch.cumsum),
        *(F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.pad, F.unfold, F.fold, F.grid_sample),
        *(F.scaled_dot_product_attention, F.pixel_shuffle, F.pixel_unshuffle, F.group_norm, F.batch_norm),
    }
)
"""Functions that mix positions and are not done across ranks."""


class Functions(TorchFunctionMode):
    """Calls of the functions above by the code of one module, but not by modules that were replaced within it."""

    def __init__(self, part: Part):
        super().__init__()
        self.part, self.depth = part, part.depth

    def __torch_function__(self, function, types, arguments=(), options=None):
        if self.part.depth != self.depth:
            return function(*arguments, **(options or {}))
        if function in REFUSED:
            raise InputError(
                f"{self.part.at} calls {function.__name__}, which mixes positions: give it an entry (docs/spatial.md)"
            )
        shared = FUNCTIONS.get(function)
        if shared is None:
            return function(*arguments, **(options or {}))
        return shared(self.part, *arguments, **(options or {}))


def through(part: Part, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """The module's own forward pass, whose resizes and max pools are of whole maps."""
    with Functions(part):
        return type(module).forward(module, *arguments, **options)

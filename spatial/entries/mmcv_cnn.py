"""mmcv's layers."""

from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._operators import convolve


def _check(module: nn.Module) -> str | None:
    return f"padding_mode '{module.padding_mode}'" if module.with_explicit_padding else None


ENTRIES = {"ConvModule": Entry(check=_check), "Conv2d": Entry(convolve)}

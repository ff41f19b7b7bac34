"""PyTorch's convolutions."""

from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._operators import convolve, convolve_transposed


def _check(conv: nn.Module) -> str | None:
    return None if conv.padding_mode == "zeros" else f"padding_mode '{conv.padding_mode}' is not done across ranks"


def _check_point(conv: nn.Module) -> str | None:
    point = conv.kernel_size == conv.stride == (1,) and conv.padding in ((0,), "valid", "same")
    return None if point else "along a sequence of tokens, of which each rank has a part"


ENTRIES = {
    "Conv1d": Entry(check=_check_point),
    "Conv2d": Entry(convolve, check=_check),
    "ConvTranspose2d": Entry(convolve_transposed, check=_check),
}

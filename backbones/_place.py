"""Where the tokens of a block stand: what a mixer needs to know besides queries, keys and values."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from terrazzo.kernels.token_reduction import prop_bias


class Place(NamedTuple):
    """Where N tokens stand: `prefix` tokens in front (class token, registers), then patches.

    A host makes it for each block and passes it to the block's attention in place of a mask. The attention adds what
    only it knows: the attributes from `x` on.

    Attributes:
        grid: Rows and columns of the patches, in raster order; None if tokens were merged or reordered.
        prefix: Number of tokens in front.
        size: (B, N), patches that each token stands for, 0 for padding; None for 1 each.
        x: (B, N, C), the input of the host's projections.
        raw_key: (B, heads, N, D), keys before they are normalised and rotated. Several query heads may share a head.
        keyed: Normalises and rotates raw keys (B, heads, M, D) that stand at the patches `positions` (M,) (indices of
            the grid in raster order), and gives each query head a head: (B, query heads, M, D).
        projected: The host's projections of derived tokens (B, M, C): raw keys as `raw_key`, and values
            (B, query heads, M, D).
    """

    grid: tuple[int, int] | None
    prefix: int = 0
    size: torch.Tensor | None = None
    x: torch.Tensor | None = None
    raw_key: torch.Tensor | None = None
    keyed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    projected: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What softmax attention adds to logits, (B, 1, 1, N): ln(size), so that a token counts as its patches."""
        bias = prop_bias(self.size)
        return None if bias is None else bias[:, None, None].to(dtype)

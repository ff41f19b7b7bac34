"""Descriptor attention of FlashVGGT: all tokens attend to a smaller map of resized tokens.

Paper: FlashVGGT: Efficient and Scalable Visual Geometry Transformers with Compressed Descriptor Attention, CVPR 2026,
arXiv 2512.01540.
"""

import math

import torch
import torch.nn.functional as F

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments

_COMPRESSORS = ("bilinear", "area", "nearest")


class Descriptor(Mixer):
    """out = softmax(s q k'^T) v', with keys and values k', v' of the tokens in front and of descriptors.

    Descriptors are the layer's input, resized to (floor(H / ratio), floor(W / ratio)), at least 1 x 1, and projected as
    all tokens are. A projection and a resize give the same in either order, so keys and values themselves are resized,
    and then keys are normalised and rotated. A descriptor's rotary position is the position of the nearest patch, as in
    the authors' code. Tokens in front stay as they are. With `ratio` 1 this is softmax attention. The cost is
    2 N (N / ratio^2) D instead of 2 N^2 D.

    The paper's compressor is "bilinear", without antialiasing: of each 4 x 4 cell it reads the 2 x 2 pixels in the
    centre. The authors' code also has a depthwise convolution that begins as the mean of a cell: "area" is its start,
    where `ratio` divides the sides.

    Ours: `counted`, which adds the logarithm of the patches per descriptor to a descriptor's logit.

    Args:
        ratio: Patches per descriptor along each side.
        compressor: "bilinear", "area" (mean of a cell) or "nearest".
        counted: Whether a descriptor counts as often as the patches that it stands for.

    Source: arXiv 2512.01540, section 3.2.
    """

    def __init__(
        self,
        host: Host,
        ratio: int = 4,
        compressor: str = "bilinear",
        counted: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        if compressor not in _COMPRESSORS:
            raise InputError(f"compressor must be one of {', '.join(_COMPRESSORS)}, got {compressor!r}")
        self.ratio = arguments.whole(ratio, "ratio", 1)
        self.compressor, self.counted = compressor, counted

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        size = tuple(max(1, side // self.ratio) for side in place.grid)
        front_key, _ = key.tensor_split([place.prefix], 2)
        front_value, value = value.tensor_split([place.prefix], 2)
        key = place.keyed(self._resized(place.raw_key[:, :, place.prefix :], place.grid, size), _nearest(place, size))
        value = self._resized(value, place.grid, size)
        mask = None
        if self.counted:
            count = torch.full((1, key.shape[2]), math.log(math.prod(place.grid) / math.prod(size)))
            mask = F.pad(count.to(query), (place.prefix, 0))
        keys, values = torch.cat([front_key, key], 2), torch.cat([front_value, value], 2)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def _resized(self, x: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """(B, heads, H W, D) to (B, heads, h w, D)."""
        heads = x.shape[1]
        x = x.transpose(1, 2).flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)  # B heads*D H W
        x = F.interpolate(x, size, mode=self.compressor)
        return x.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)


def _nearest(place: Place, size: tuple[int, int]) -> torch.Tensor:
    """The patch, as an index of the grid, whose position each descriptor has."""
    rows, columns = (
        torch.arange(short, device=place.raw_key.device) * long // short for long, short in zip(place.grid, size)
    )
    return (rows[:, None] * place.grid[1] + columns).flatten()

"""Descriptor attention of FlashVGGT: all tokens attend to a smaller map of resized tokens.

Paper: FlashVGGT: Efficient and Scalable Visual Geometry Transformers with Compressed Descriptor Attention, CVPR 2026,
arXiv 2512.01540.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.backbones.mixers._tiling import Tiling
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch import arguments

_COMPRESSORS = ("bilinear", "area", "nearest", "dwconv")
# Numbers of keys of tiles alive at once.
_PART = 1 << 24


class Descriptor(Mixer):
    """out = softmax(s q k'^T) v', with keys and values k', v' of the tokens in front and of descriptors.

    Descriptors are the layer's input, resized to (floor(H / ratio), floor(W / ratio)), at least 1 x 1, and projected as
    all tokens are. A projection and a resize give the same in either order, so keys and values themselves are resized,
    and then keys are normalised and rotated. A descriptor's rotary position is the position of the nearest patch, as in
    the authors' code. Tokens in front stay as they are. With `ratio` 1 this is softmax attention. The cost is
    2 N (N / ratio^2) D instead of 2 N^2 D.

    The paper's compressor is "bilinear", without antialiasing: of each 4 x 4 cell it reads the 2 x 2 pixels in the
    centre. The authors' code also has "dwconv", a depthwise convolution of the layer's input. It begins as the mean of
    a cell and does not read rows and columns behind the last full cell.

    Ours, for models that are not trained with it: `counted` adds the logarithm of the patches per descriptor to a
    descriptor's logit. With `local`, a patch also attends to each patch of its own tile, in place of the descriptors
    whose centres are in the tile, and tokens in front attend to all tokens. A tile of the whole map is softmax
    attention.

    Args:
        ratio: Patches per descriptor along each side.
        compressor: "bilinear", "area" (mean of a cell), "nearest" or "dwconv", which has a parameter.
        counted: Whether a descriptor counts as often as the patches that it stands for.
        local: Edge in patches of the tiles whose patches attend to each other; None for descriptors alone.

    Source: arXiv 2512.01540.
    """

    def __init__(
        self,
        host: Host,
        ratio: int = 4,
        compressor: str = "bilinear",
        counted: bool = False,
        local: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        if compressor not in _COMPRESSORS:
            raise InputError(f"compressor must be one of {', '.join(_COMPRESSORS)}, got {compressor!r}")
        self.ratio = arguments.whole(ratio, "ratio", 1)
        self.local = local if local is None else arguments.whole(local, "local", 1)
        self.compressor, self.counted = compressor, counted
        self.cells = None
        if compressor == "dwconv":
            options = {"stride": self.ratio, "groups": host.dim, "bias": False, "device": device, "dtype": dtype}
            self.cells = nn.Conv2d(host.dim, host.dim, self.ratio, **options)
            nn.init.constant_(self.cells.weight, self.ratio**-2)

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        if self.cells is not None and min(grid) < self.ratio:
            return f"the map is smaller than a cell of {self.ratio} x {self.ratio} patches"
        return None

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        size = tuple(max(1, side // self.ratio) for side in place.grid)
        front_keys, front_values = (x[:, :, : place.prefix] for x in (key, value))
        if self.cells is not None:
            cells = self.cells(place.x[:, place.prefix :].unflatten(1, place.grid).permute(0, 3, 1, 2))
            keys, values = place.projected(cells.flatten(2).transpose(1, 2))
        else:
            patches = (x[:, :, place.prefix :] for x in (place.raw_key, value))
            keys, values = (self._resized(x, place.grid, size) for x in patches)
        keys = place.keyed(keys, _nearest(place, size))
        count = math.log(math.prod(place.grid) / math.prod(size)) if self.counted else 0.0
        keys, values = torch.cat([front_keys, keys], 2), torch.cat([front_values, values], 2)
        if self.local is None:
            mask = None
            if self.counted:
                mask = F.pad(query.new_full((1, math.prod(size)), count), (place.prefix, 0))
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self._local(query, key, value, place, (keys, values), size, count)

    def _local(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        place: Place,
        shared: tuple[torch.Tensor, torch.Tensor],
        size: tuple[int, int],
        count: float,
    ) -> torch.Tensor:
        """Attention to the patches of the own tile, and to `shared` keys and values without the own descriptors.

        Args:
            shared: (B, heads, prefix + h w, D), tokens in front and descriptors.
            size: h and w.
            count: What is added to descriptors' logits.
        """
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        tiling = Tiling(place.grid, tuple(min(self.local, side) for side in place.grid))
        own = _tiles_of(tiling, size, query.device) == torch.arange(tiling.count, device=query.device)[:, None]
        mask = F.pad(query.new_full(own.shape, count).masked_fill(own, -math.inf), (place.prefix, 0))
        inside = query.new_zeros(tiling.count, math.prod(tiling.tile))
        if not tiling.full:
            inside = inside.masked_fill(tiling.absent(query.device), -math.inf)
        mask = torch.cat([inside, mask], 1)[None, :, None]  # 1 tiles 1 keys
        tiles = (tiling.cut(x[:, :, place.prefix :]) for x in (query, key, value))  # B heads tiles tokens D
        step = max(1, _PART // max(1, math.prod(query.shape[:2]) * query.shape[3] * mask.shape[3]))
        parts = [_attended(*part, *shared) for part in zip(*(x.split(step, 2) for x in tiles), mask.split(step, 1))]
        return torch.cat([front, tiling.joined(torch.cat(parts, 2))], 2)

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


def _tiles_of(tiling: Tiling, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The tile in which each descriptor's centre is."""
    rows, columns = (
        (2 * torch.arange(short, device=device) + 1) * long // (2 * short) // edge
        for long, short, edge in zip(tiling.grid, size, tiling.tile)
    )
    return (rows[:, None] * tiling.columns + columns).flatten()


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
) -> torch.Tensor:
    """Attention of tiles (B, heads, tiles, tokens, D) to their own tokens and to keys (B, heads, M, D) of all tiles."""
    given = [query]
    for own, shared in ((key, shared_key), (value, shared_value)):
        given.append(torch.cat([own, shared.unsqueeze(2).expand(-1, -1, own.shape[2], -1, -1)], 3))
    out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in given), attn_mask=mask)
    return out.unflatten(0, query.shape[:2])

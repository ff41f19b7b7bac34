"""Recursive-generalization attention of RGT: all tokens attend to a small map, the result of a repeated convolution.

Paper: Recursive Generalization Transformer for Image Super-Resolution, ICLR 2024, arXiv 2303.06373.
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import on_maps
from terrazzo.backbones._place import Place
from terrazzo.backbones._recursion import STRIDE, Generalization, power_below, recursions_of
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.kernels.dispatch import arguments


class RecursiveGeneralization(Mixer):
    """out = softmax(s q k'^T) v', with keys and values k', v' of the tokens in front and of a small map.

    The small map is made of the layer's input by T times the same depthwise convolution, which reduces both sides by 4,
    a depthwise and a pointwise convolution, a norm and GELU. The layer's own projections make its keys and values, and
    a depthwise convolution adds positions to its values. This is RG-SA with as many channels for queries and keys as
    for values (the authors' `c_ratio` of 1; their networks have 0.5, with which the layer's projections could not be
    used). The cost is 2 N N' D with N' = N / 16^T.

    Ours: tokens in front are keys and values of all tokens. A key of the small map has the rotary position of the patch
    in the middle of its cell. T is the same in training as in evaluation, at least 1, and not larger than the map
    allows. At the start the small map has means of cells, before the norm, and positions are zero.

    Args:
        recursions: T; None for the authors' rule of evaluation: 2 for maps with a longer side below 1024, or 1 if the
            shorter side is below 16.

    Source: arXiv 2303.06373, section 3.
    """

    open_sizes = False

    def __init__(
        self,
        host: Host,
        recursions: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        self.recursions = recursions if recursions is None else arguments.whole(recursions, "recursions", 1)
        factory, channels = dict(device=device, dtype=dtype), host.heads * host.head_dim
        self.generalization = Generalization(host.dim, host.dim, **factory)
        self.cpe = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **factory)
        own = self.generalization
        nn.init.constant_(own.reduction1.weight, STRIDE**-2)
        nn.init.dirac_(own.dwconv.weight, groups=host.dim)
        nn.init.dirac_(own.conv.weight)
        nn.init.zeros_(self.cpe.weight)
        for layer in (own.reduction1, own.dwconv, own.conv, self.cpe):
            nn.init.zeros_(layer.bias)

    def dense(self, grid: tuple[int, int], prefix: int) -> str | None:
        return f"a side of the map is less than {STRIDE} patches" if min(grid) < STRIDE else None

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        times = recursions_of(place.grid, training=False) if self.recursions is None else self.recursions
        times = min(times, power_below(min(place.grid)))
        z, small = self.generalization.summary(place.x[:, place.prefix :].unflatten(1, place.grid), times)
        keys, values = place.projected(z)
        keys = place.keyed(keys, _middles(place.grid, small, STRIDE**times, key.device))
        maps = values.transpose(1, 2).flatten(2).unflatten(1, small)  # B h w C
        positions = on_maps(maps, self.cpe).flatten(1, 2).unflatten(2, (self.host.heads, -1)).transpose(1, 2)
        keys = torch.cat([key[:, :, : place.prefix], keys], 2)
        values = torch.cat([value[:, :, : place.prefix], values + positions], 2)
        return F.scaled_dot_product_attention(query, keys, values)


def _middles(grid: tuple[int, int], small: tuple[int, int], cell: int, device: torch.device) -> torch.Tensor:
    """The patch in the middle of each cell, as an index of the grid, (h w,)."""
    rows, columns = (torch.arange(side, device=device) * cell + cell // 2 for side in small)
    return (rows[:, None] * grid[1] + columns).flatten()

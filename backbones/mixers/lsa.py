"""Local attention of RGT: half of the heads attend in wide windows, and half in high windows.

Paper: Recursive Generalization Transformer for Image Super-Resolution, ICLR 2024, arXiv 2303.06373.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._checks import wholes
from terrazzo.backbones._layers import on_maps
from terrazzo.backbones._place import Place
from terrazzo.backbones._rectangles import WindowBias, rectangle_attention
from terrazzo.backbones.mixers._mixer import Host, Mixer
from terrazzo.errors import InputError

_FAR = -3e4
"""What is added to logits of absent patches before they are scaled; float16 has it, too."""


class LocalRectangles(Mixer):
    """out = softmax(s q k^T + b) v in rectangular windows, plus a depthwise 3x3 convolution of the values.

    The first half of the heads (the larger half of an odd number) has windows of `split` rows and columns, and the
    other heads have windows of as many columns and rows. In every second pair of layers windows are shifted by half
    their sides, as by Swin: RGT, whose local and global layers alternate, shifts every second local layer. The bias b
    of a head is a small MLP of the offset. The cost is 2 N rows columns D in place of 2 N^2 D.

    Ours: tokens in front are keys of every window, without a bias, in the same softmax, and attend to all tokens.
    Patches beyond the border are absent. The bias and the convolution begin at zero, so that a converted model begins
    with plain attention in windows.

    Args:
        split: Rows and columns of wide windows; one divides the other.
        shifted: Whether windows are shifted; None for every second pair of layers.
        masked: Whether patches beyond the border are absent. In the authors' code (False) they are zeros, which take
            part in the softmax.

    Source: arXiv 2303.06373, section 3.
    """

    open_sizes = False
    local = ("get_v.weight", "get_v.bias")

    def __init__(
        self,
        host: Host,
        split: Sequence[int] = (8, 32),
        shifted: bool | None = None,
        masked: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(host)
        split = wholes("split", split)
        if len(split) != 2 or min(split) < 2 or max(split) % min(split):
            raise InputError(f"split must be two sides of which one divides the other, such as (8, 32), got {split}")
        self.shifted = host.layer // 2 % 2 == 1 if shifted is None else bool(shifted)
        self.masked = masked
        factory, channels = dict(device=device, dtype=dtype), host.heads * host.head_dim
        self.heads = [count for count in (host.heads - host.heads // 2, host.heads // 2) if count]
        self.attns = nn.ModuleList(
            WindowBias(window, heads, channels // 2 // 4, **factory)
            for window, heads in zip((split, split[::-1]), self.heads)
        )
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **factory)
        for layer in (self.get_v, *(bias.pos.pos3[2] for bias in self.attns)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        maps = value[:, :, place.prefix :].transpose(1, 2).flatten(2).unflatten(1, place.grid)  # B H W C
        local = on_maps(maps, self.get_v).flatten(1, 2).unflatten(2, (self.host.heads, -1)).transpose(1, 2)
        return self._attended(query, key, value, place) + F.pad(local, (0, 0, place.prefix, 0))

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        own = torch.eye(query.shape[2], dtype=query.dtype, device=query.device)
        return self._attended(query, key, own.expand(*query.shape[:2], -1, -1), place)

    def _attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        """Attention alone; values (B, heads, N, E) may have any channels."""
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        heads, scale, channels = query.shape[1], query.shape[3] ** -0.5, value.shape[3]
        multiple = max(self.attns[0].window)
        missing = [-side % multiple for side in place.grid]
        if self.masked and any(missing):  # one more channel takes absent patches out of the softmax
            query, key, value = F.pad(query, (0, 1), value=1.0), F.pad(key, (0, 1)), F.pad(value, (0, 1))
        filling = (0, 0, 0, 0, 0, missing[1], 0, missing[0])
        maps = [x[:, :, place.prefix :].transpose(1, 2).unflatten(1, place.grid) for x in (query, key, value)]
        maps = [F.pad(x, filling) for x in maps]  # B H W heads D
        if self.masked and any(missing):
            present = query.new_zeros(1, *place.grid, 1, 1)
            absent = F.pad(present, filling, value=_FAR).expand(len(query), -1, -1, heads, -1)
            maps[1] = torch.cat([maps[1][..., :-1], absent], -1)
        parts, shared = [], (key[:, :, : place.prefix], value[:, :, : place.prefix])
        for i, attention in enumerate(self.attns):
            own = [x.split(self.heads, 3)[i] for x in maps]
            seen = tuple(x.split(self.heads, 1)[i] for x in shared) if place.prefix else None
            shift = tuple(side // 2 for side in attention.window) if self.shifted else (0, 0)
            parts.append(rectangle_attention(*own, attention.window, attention(), shift, seen, scale))
        out = torch.cat(parts, 3)[:, : place.grid[0], : place.grid[1], :, :channels]
        return torch.cat([front, out.flatten(1, 2).transpose(1, 2)], 2)

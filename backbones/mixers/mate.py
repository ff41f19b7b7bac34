"""MATE: Mamba-2's scan in both directions, and attention in windows, mixed by a learned weight for each token.

Papers: LinGen (MATE), CVPR 2025, arXiv 2412.09856; LinMU (M-MATE), TMLR 2026, arXiv 2601.01322. No official code was
published. The form for images is ours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones._layers import split_windows, window_counts
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Host
from terrazzo.backbones.mixers._state_space import StateSpace
from terrazzo.kernels.dispatch import arguments


class Mate(StateSpace):
    """out = w scan + (1 - w) window attention, w = sigmoid(W u + b) for each token and head.

    The scan is that of the mixer "ssd". The window attention is Swin's, with the host's queries, keys and values, a
    learned relative bias, and windows that are shifted by half a window in layers with odd numbers. Tokens in front
    take part in the scan alone. A map that fits into a window has one window, without shift.

    At the start w is 0.5 and the bias is 0. The cost is linear in N. The papers have an output projection for each
    branch. Here the branches share the host's, and w acts in front of it: at the start this is the same.

    Source: arXiv 2601.01322 (M-MATE), arXiv 2412.09856 (MATE).
    """

    local = ("relative_position_bias_table",)

    def __init__(
        self,
        host: Host,
        window: int = 7,
        scale: float = 1.0,
        review: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Args:
        window: Side of a window; 8 fits maps whose sides are multiples of 8.
        scale: Factor of the scan's queries at the start; see `ssd`.
        review: Whether averages of 8x8 patches come before the tokens in both directions; None for 1024 patches
            or more.
        """
        super().__init__(host, scale, review, device, dtype)
        self.window = arguments.whole(window, "window", 1)
        factory = dict(device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, host.heads, **factory))
        self.mix_proj = nn.Linear(host.dim, host.heads, **factory)
        nn.init.zeros_(self.mix_proj.weight)
        nn.init.zeros_(self.mix_proj.bias)

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        front, scanned = self.scanned(query, key, value, place).tensor_split([place.prefix], 2)
        patches = [x[:, :, place.prefix :].unflatten(2, place.grid) for x in (query, key, value)]
        windowed = self.windowed(*patches).flatten(2, 3)
        weight = self.mix_proj(place.x).to(scanned.dtype).sigmoid()[:, place.prefix :].transpose(1, 2).unsqueeze(3)
        return torch.cat([front, torch.lerp(windowed.to(scanned.dtype), scanned, weight)], 2).to(value.dtype)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        scanned = self.scan_weights(query, key, value, place)
        patches = [x[:, :, place.prefix :].unflatten(2, place.grid) for x in (query, key)]
        count = place.grid[0] * place.grid[1]
        own = torch.eye(count, dtype=query.dtype, device=query.device).unflatten(0, place.grid)
        windowed = self.windowed(*patches, own.expand(*query.shape[:2], -1, -1, -1)).flatten(2, 3)
        weight = self.mix_proj(place.x.to(self.mix_proj.weight.dtype)).to(query.dtype).sigmoid()
        weight = weight[:, place.prefix :].transpose(1, 2).unsqueeze(3)
        front, scanned = scanned.tensor_split([place.prefix], 2)
        return torch.cat([front, torch.lerp(F.pad(windowed, (place.prefix, 0)), scanned, weight)], 2)

    def windowed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention within windows of maps (B, heads, H, W, D)."""
        grid = tuple(query.shape[2:4])
        window = tuple(min(side, self.window) for side in grid)
        # A shift makes a first row and column of smaller windows, which are filled up with padding in front.
        odd = self.host.layer % 2 == 1
        front = [side - side // 2 if odd and extent > side > 1 else 0 for extent, side in zip(grid, window)]
        padding = (0, 0, front[1], 0, front[0], 0)
        padded = (grid[0] + front[0], grid[1] + front[1])
        rows, columns = window_counts(padded, window)

        def cut(x):
            x = F.pad(x.flatten(0, 1), padding)
            return split_windows(x, window).flatten(3, 4).unflatten(0, query.shape[:2]).movedim(1, 3).flatten(0, 2)

        real = split_windows(F.pad(query.new_ones(1, *grid, 1), padding), window).flatten(3).flatten(0, 2)
        bias = self._bias(window).to(query.dtype) + torch.where(real > 0, 0, -torch.inf).to(query.dtype)[:, None, None]
        bias = bias.expand(query.shape[0], -1, -1, -1, -1).flatten(0, 1)
        out = F.scaled_dot_product_attention(*(cut(x) for x in (query, key, value)), attn_mask=bias)
        # B rows columns heads h w D
        out = out.unflatten(0, (query.shape[0], rows, columns)).unflatten(4, window)
        out = out.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
        return out[:, :, front[0] : padded[0], front[1] : padded[1]]

    def _bias(self, window: tuple[int, int]) -> torch.Tensor:
        """(heads, n, n), the bias for the n places of a window."""
        table = self.relative_position_bias_table
        steps = torch.arange(window[0] * window[1], device=table.device)
        row, column = steps // window[1], steps % window[1]
        row, column = (x[:, None] - x + self.window - 1 for x in (row, column))
        return table[row * (2 * self.window - 1) + column].permute(2, 0, 1)

"""Axial trajectory attention: the tracks of a clip's tokens along heights, then along widths."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.clips.trajectory import TrajectoryAttention
from terrazzo.errors import InputError


class AxialTrajectoryLayer(nn.Module):
    """Trajectory attention in the columns of all frames, then in their rows, then a perceptron; with norms behind.

    A token meets T H + T W tokens in place of T H W. With one frame it is an axial layer of one image.

    Args:
        dim: Channels C.
        hidden: Channels inside the perceptron.
        heads: Heads of both attentions.
        dropout: Dropout of both attentions' outputs; the authors call it `attn_drop`.
        inner_dropout: Dropout of the attentions' weights and of the perceptron; the authors call it `dropout`.
        device, dtype: Device and type of the parameters.

    Source: arXiv 2311.18537, section 3.2, and the authors' code, where one norm follows both attentions.
    """

    def __init__(
        self,
        dim: int = 256,
        hidden: int = 1024,
        heads: int = 8,
        dropout: float = 0.0,
        inner_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.height_attn = TrajectoryAttention(dim, heads, inner_dropout, **factory)
        self.width_attn = TrajectoryAttention(dim, heads, inner_dropout, **factory)
        self.dropout, self.inner_dropout = nn.Dropout(dropout), nn.Dropout(inner_dropout)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.linear1 = nn.Linear(dim, hidden, **factory)
        self.linear2 = nn.Linear(hidden, dim, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of clips.

        Args:
            x: (B T, H W, C).
            position: (B, T, H, W, C) or (1, T, H, W, C), added to queries and keys.

        Returns:
            (B T, H W, C).

        Raises:
            InputError: `x` and `position` do not fit together.
        """
        clips, frames, height, width = position.shape[:4]
        if frames < 1 or len(x) % frames:
            raise InputError(f"frames ({frames}) must divide the maps ({len(x)})")
        if clips not in (1, len(x) // frames):
            raise InputError(f"position must be of 1 clip or of all clips ({len(x) // frames}), got {clips}")
        if x.shape[1:] != (height * width, position.shape[4]):
            raise InputError(
                f"maps of positions {height}x{width}x{position.shape[4]} must be "
                f"(B T, {height * width}, {position.shape[4]}), got {tuple(x.shape)}"
            )
        x = x.unflatten(0, (-1, frames)).unflatten(2, (height, width))  # B T H W C
        x = self._axis(self.height_attn, x.permute(0, 3, 1, 2, 4), position.permute(0, 3, 1, 2, 4))  # B W T H C
        x = self._axis(self.width_attn, x.permute(0, 3, 2, 1, 4), position.permute(0, 2, 1, 3, 4))  # B H T W C
        x = self.norm1(x.transpose(1, 2).flatten(0, 1).flatten(1, 2))
        hidden = self.inner_dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.inner_dropout(self.linear2(hidden)))

    def _axis(self, attention: TrajectoryAttention, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Attention inside each line: x (B, lines, T, tokens, C)."""
        lines, placed = x.flatten(2, 3).flatten(0, 1), (x + position).flatten(2, 3).flatten(0, 1)
        out = lines + self.dropout(attention(placed, placed, lines, frames=x.shape[2]))
        return out.view(x.shape)


class AxialTrajectoryEncoder(nn.Module):
    """Axial trajectory layers, one after another; the authors call it `TemporalEncoder`.

    Args:
        layers: Number of layers.
        dim, hidden, heads, dropout: See `AxialTrajectoryLayer`.
    """

    def __init__(self, layers: int = 1, dim: int = 256, hidden: int = 1024, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.temporal_layers = nn.ModuleList([AxialTrajectoryLayer(dim, hidden, heads, dropout) for _ in range(layers)])

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of clips; see `AxialTrajectoryLayer`."""
        for layer in self.temporal_layers:
            x = layer(x, position)
        return x

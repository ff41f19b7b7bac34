"""Attention in rectangular windows, of RGT's local blocks and of the mixer `lsa`.

Paper: Recursive Generalization Transformer for Image Super-Resolution, ICLR 2024, arXiv 2303.06373, section 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

_APART = -100.0
"""What Swin adds to logits of tokens that stand together only because the map was rolled."""


class DynamicPosBias(nn.Module):
    """Bias of each head from offsets (..., 2), by a small MLP: (..., heads).

    Source: CrossFormer, arXiv 2108.00154, dynamic position bias, as in RGT's code: without residuals.
    """

    def __init__(self, heads: int, dim: int, **factory):
        """Args:
        dim: Four times the channels of the MLP, at least 1 channel.
        """
        super().__init__()
        hidden = max(1, dim // 4)
        self.pos_proj = nn.Linear(2, hidden, **factory)
        self.pos1 = self._step(hidden, hidden, **factory)
        self.pos2 = self._step(hidden, hidden, **factory)
        self.pos3 = self._step(hidden, heads, **factory)

    @staticmethod
    def _step(channels: int, out_channels: int, **factory) -> nn.Sequential:
        norm = nn.LayerNorm(channels, **factory)
        return nn.Sequential(norm, nn.ReLU(), nn.Linear(channels, out_channels, **factory))

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class WindowBias(nn.Module):
    """Relative position bias (heads, N, N) of the N tokens of a rectangular window.

    Attributes:
        window: Rows and columns.
        rpe_biases: ((2 rows - 1) (2 columns - 1), 2), all offsets in tokens. It is in the state dict, as in the
            authors' files.
    """

    def __init__(self, window: tuple[int, int], heads: int, dim: int, **factory):
        """Args: see `DynamicPosBias` for `dim`."""
        super().__init__()
        self.window = window
        axes = (torch.arange(1.0 - side, side, **factory) for side in window)
        self.register_buffer("rpe_biases", torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1))
        self.pos = DynamicPosBias(heads, dim, **factory)

    def forward(self) -> torch.Tensor:
        bias = self.pos(self.rpe_biases)  # offsets heads
        rows, columns = (torch.arange(side, device=bias.device) for side in self.window)
        down, right = (place[:, None] - place + len(place) - 1 for place in (rows, columns))
        index = down[:, None, :, None] * (2 * len(columns) - 1) + right[:, None]
        return bias[index.flatten()].unflatten(0, (rows.numel() * columns.numel(),) * 2).permute(2, 0, 1)


def rectangle_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: tuple[int, int],
    bias: torch.Tensor,
    shift: tuple[int, int] = (0, 0),
    front: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(s q k^T + b) v in windows of a map, all of one size.

    Only the last row and the last column of windows of a rolled map have tokens that stand apart. So there are four
    masks, whatever the size of the map.

    Args:
        query, key, value: (B, H, W, heads, D); values may have another D. H and W are multiples of the window's sides.
        bias: (heads, N, N), for the N tokens of a window.
        shift: Rows and columns by which the map is rolled up and left before it is cut; the result is rolled back.
        front: Keys and values (B, heads, P, D) that are in every window, without a bias.
        scale: s; None for D ** -0.5.

    Returns:
        (B, H, W, heads, D).
    """
    windows = [_windows(x, window, shift) for x in (query, key, value)]  # B rows columns heads N D

    def attended(rows: slice, columns: slice, mask: torch.Tensor) -> torch.Tensor:
        parts = [x[:, rows, columns] for x in windows]
        counts = parts[0].shape[:3]
        q, k, v = (x.flatten(0, 2) for x in parts)
        if front is not None:
            more = (x[:, None, None].expand(-1, *counts[1:], -1, -1, -1).flatten(0, 2) for x in front)
            k, v = (torch.cat([x, y], 2) for x, y in zip(more, (k, v)))
            mask = F.pad(mask, (front[0].shape[2], 0))
        mask = mask[None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).unflatten(0, counts)

    every, body, last = slice(None), slice(None, -1), slice(-1, None)
    if not any(shift):
        out = attended(every, every, bias)
    else:
        below, beside = (_apart(window, shift, axis, bias) for axis in (0, 1))
        upper = torch.cat([attended(body, body, bias), attended(body, last, bias + _APART * beside)], 2)
        corner = attended(last, last, bias + _APART * (below | beside))
        out = torch.cat([upper, torch.cat([attended(last, body, bias + _APART * below), corner], 2)], 1)
    out = out.transpose(3, 4).unflatten(3, window)  # B rows columns h w heads D
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.roll(shift, (1, 2)) if any(shift) else out


def _windows(x: torch.Tensor, window: tuple[int, int], shift: tuple[int, int]) -> torch.Tensor:
    """(B, H, W, heads, D) to windows (B, rows, columns, heads, N, D) of the rolled map."""
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    (rows, height), (columns, width) = ((side // edge, edge) for side, edge in zip(x.shape[1:3], window))
    x = x.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3)
    return x.flatten(3, 4).transpose(3, 4)


def _apart(window: tuple[int, int], shift: tuple[int, int], axis: int, like: torch.Tensor) -> torch.Tensor:
    """(N, N), whether two tokens of the last window along an axis come from different borders of the map."""
    place = torch.arange(window[axis], device=like.device)
    wrapped = place >= window[axis] - shift[axis] if shift[axis] else torch.zeros_like(place, dtype=torch.bool)
    grid = wrapped[:, None].expand(window) if axis == 0 else wrapped[None].expand(window)
    return grid.flatten()[:, None] != grid.flatten()

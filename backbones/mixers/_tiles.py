"""Tiles: patches of a map in an order in which every square of neighbours stands together."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class Tiles:
    """Squares of patches, nested: tiles of `edges[0]` patches a side hold tiles of `edges[1]` patches a side, and so on.

    Tiles stand in raster order in the map or in their outer tile, and patches in raster order in the innermost tile.
    A map that outer tiles do not divide is filled at the right and at the bottom. A slot is a place in this order.

    Attributes:
        grid: rows and columns of patches.
        edges: sides of tiles, from the outermost to the innermost; each divides the one before.
        rows, cols: numbers of outermost tiles.
    """

    def __init__(self, grid: tuple[int, int], edges: Sequence[int]):
        self.grid, self.edges = grid, tuple(edges)
        self.rows, self.cols = (-(-side // self.edges[0]) for side in grid)

    @property
    def slots(self) -> int:
        return self.rows * self.cols * self.edges[0] ** 2

    @property
    def fill(self) -> int:
        """Slots without a patch."""
        return self.slots - self.grid[0] * self.grid[1]

    def arrange(self, x: torch.Tensor, value: float = 0) -> torch.Tensor:
        """Patches (B, heads, N, D) in raster order to slots (B, heads, slots, D), filled with `value`."""
        (height, width), edge = self.grid, self.edges[0]
        x = x.unflatten(2, self.grid)
        if self.fill:
            x = F.pad(x, (0, 0, 0, self.cols * edge - width, 0, self.rows * edge - height), value=value)
        x = x.unflatten(3, self._sizes(self.cols)).unflatten(2, self._sizes(self.rows))
        return x.permute(0, 1, *(2 + axis for axis in self._axes()), -1).flatten(2, -2)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `arrange`: slots (B, heads, slots, D) to patches (B, heads, N, D)."""
        axes, parts = self._axes(), len(self.edges) + 1
        both = self._sizes(self.rows) + self._sizes(self.cols)
        x = x.unflatten(2, [both[axis] for axis in axes])
        x = x.permute(0, 1, *(2 + axes.index(axis) for axis in range(2 * parts)), -1)
        x = x.flatten(2 + parts, -2).flatten(2, 1 + parts)
        return x[:, :, : self.grid[0], : self.grid[1]].flatten(2, 3)

    def order(self, device: torch.device | None = None) -> torch.Tensor:
        """The patch in each slot, (slots,) int64, -1 for none."""
        patches = torch.arange(self.grid[0] * self.grid[1], device=device)
        return self.arrange(patches[None, None, :, None], -1).flatten()

    def real(self, device: torch.device | None = None) -> torch.Tensor | None:
        """Which slots hold a patch, (slots,) bool; None if all do."""
        return self.order(device) >= 0 if self.fill else None

    def counts(self, edge: int, device: torch.device | None = None) -> torch.Tensor | None:
        """The patches in each tile with a side of `edge`, (tiles,) int64; None if all tiles are full."""
        return self.real(device).unflatten(0, (-1, edge * edge)).sum(1) if self.fill else None

    def neighbours(self, device: torch.device | None = None) -> torch.Tensor:
        """Each outermost tile and the 8 tiles around it: (tiles, 9) int64, -1 outside of the map."""
        number = torch.arange(self.rows * self.cols, device=device).view(self.rows, self.cols)
        number = F.pad(number, (1, 1, 1, 1), value=-1)
        around = [number[i : i + self.rows, j : j + self.cols] for i in range(3) for j in range(3)]
        return torch.stack(around, -1).flatten(0, 1)

    def _sizes(self, tiles: int) -> list[int]:
        """One side of the filled map as sizes of nested parts."""
        inner = [outer // edge for outer, edge in zip(self.edges, self.edges[1:])]
        return [tiles, *inner, self.edges[-1]]

    def _axes(self) -> list[int]:
        """Parts of rows (from 0) and of columns (behind them) as they alternate in the order of slots."""
        parts = len(self.edges) + 1
        return [axis + side for axis in range(parts) for side in (0, parts)]


def nested_tile_order(height: int, width: int, edges: Sequence[int]) -> torch.Tensor:
    """The patch in each slot, in raster order of the map, (slots,) int64, -1 for none; see `Tiles`."""
    return Tiles((height, width), edges).order()

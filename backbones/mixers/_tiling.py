"""Maps cut into tiles: the tokens of a tile side by side."""

import torch

from terrazzo.backbones._layers import join_windows, split_windows, window_counts


class Tiling:
    """A map cut into tiles of equal size, in raster order; tiles at the lower and the right border may be cut short.

    Attributes:
        rows, columns: Numbers of tiles.
        full: Whether the tiles fill the map, so that no tile is cut short.
    """

    def __init__(self, grid: tuple[int, int], tile: tuple[int, int]):
        self.grid, self.tile = grid, tile
        self.rows, self.columns = window_counts(grid, tile)
        self.full = grid == (self.rows * tile[0], self.columns * tile[1])

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, H W, D) to (B, heads, tiles, tokens of a tile, D); missing tokens are 0."""
        windows = split_windows(x.flatten(0, 1).unflatten(1, self.grid), self.tile)
        return windows.flatten(3, 4).flatten(1, 2).unflatten(0, x.shape[:2])

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `cut`."""
        windows = x.flatten(0, 1).unflatten(2, self.tile).unflatten(1, (self.rows, self.columns))
        return join_windows(windows, self.grid).flatten(1, 2).unflatten(0, x.shape[:2])

    def absent(self, device: torch.device) -> torch.Tensor:
        """(tiles, tokens of a tile), True where no token is."""
        ones = torch.ones(1, 1, self.grid[0] * self.grid[1], 1, device=device)
        return self.cut(ones)[0, 0, :, :, 0] == 0

"""Maps cut into tiles: the tokens of a tile side by side."""

import torch
import torch.nn.functional as F


class Tiling:
    """A map cut into tiles of equal size, in raster order; tiles at the lower and the right border may be cut short.

    Attributes:
        rows, columns: Numbers of tiles.
        full: Whether the tiles fill the map, so that no tile is cut short.
    """

    def __init__(self, grid: tuple[int, int], tile: tuple[int, int]):
        self.grid, self.tile = grid, tile
        self.rows, self.columns = (-(-side // edge) for side, edge in zip(grid, tile))
        self.missing = tuple(count * edge - side for count, edge, side in zip((self.rows, self.columns), tile, grid))
        self.full = self.missing == (0, 0)

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, H W, D) to (B, heads, tiles, tokens of a tile, D); missing tokens are 0."""
        x = x.unflatten(2, self.grid)
        if not self.full:
            x = F.pad(x, (0, 0, 0, self.missing[1], 0, self.missing[0]))
        x = x.unflatten(3, (self.columns, self.tile[1])).unflatten(2, (self.rows, self.tile[0]))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `cut`."""
        x = x.unflatten(3, self.tile).unflatten(2, (self.rows, self.columns)).transpose(3, 4)
        x = x.flatten(4, 5).flatten(2, 3)
        return x[:, :, : self.grid[0], : self.grid[1]].flatten(2, 3)

    def absent(self, device: torch.device) -> torch.Tensor:
        """(tiles, tokens of a tile), True where no token is."""
        ones = torch.ones(1, 1, self.grid[0] * self.grid[1], 1, device=device)
        return self.cut(ones)[0, 0, :, :, 0] == 0

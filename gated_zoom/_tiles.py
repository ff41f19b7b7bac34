"""Where tiles lie in a picture, and what their crops cover."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A rectangle of pixels; `bottom` and `right` are not part of it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rectangle as an index of the last two dimensions."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Grid:
    """The tiles of a picture, by rows.

    Tiles cover the picture without overlap; tiles at the bottom and at the right may be smaller. The model sees a crop
    around each tile. All crops of a picture have one size. At the picture's edges, crops are shifted into the picture,
    not padded. Crops begin at multiples of the model's stride. So a crop's maps have the places of the picture's maps.

    Attributes:
        height, width: Size of the picture in pixels.
        tile: Side of a tile, a multiple of the stride.
        halo: Pixels that a crop has around its tile, a multiple of the stride.
        stride: The model's stride.
    """

    height: int
    width: int
    tile: int
    halo: int
    stride: int = 1

    @property
    def rows(self) -> int:
        """Number of rows of tiles."""
        return -(-self.height // self.tile)

    @property
    def columns(self) -> int:
        """Number of columns of tiles."""
        return -(-self.width // self.tile)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of every crop.

        They are longer than tile and halos by what the picture is longer than a multiple of the stride, because the
        last crop begins at a multiple of the stride and ends with the picture.
        """
        return self._crop_side(self.height), self._crop_side(self.width)

    def inner(self, index: int) -> Window:
        """The pixels of a tile."""
        top, left = (side * self.tile for side in divmod(index, self.columns))
        return Window(top, left, min(top + self.tile, self.height), min(left + self.tile, self.width))

    def crop(self, index: int) -> Window:
        """The pixels that the model sees for a tile."""
        inner, (height, width) = self.inner(index), self.crop_size
        top = min(max(inner.top - self.halo, 0), self.height - height)
        left = min(max(inner.left - self.halo, 0), self.width - width)
        return Window(top, left, top + height, left + width)

    def pool(self, maps: Tensor) -> Tensor:
        """Means over the tiles.

        Args:
            maps: (B, C, h, w), of any size; a cell counts for a tile by the area that they share.

        Returns:
            (B, C, rows, columns).
        """
        down = self._shares(maps.shape[2], self.height, self.rows).to(maps)
        across = self._shares(maps.shape[3], self.width, self.columns).to(maps)
        return down @ maps @ across.T

    def _crop_side(self, length: int) -> int:
        return min(self.tile + 2 * self.halo + length % self.stride, length)

    def _shares(self, cells: int, length: int, tiles: int) -> Tensor:
        """For each tile the share of each cell of a side, (tiles, cells)."""
        cell = torch.arange(cells + 1, dtype=torch.float64) * (length / cells)
        edge = (torch.arange(tiles + 1) * self.tile).clamp(max=length).double()
        start = torch.maximum(edge[:-1, None], cell[:-1])
        end = torch.minimum(edge[1:, None], cell[1:])
        return (end - start).clamp(min=0) / (edge[1:] - edge[:-1])[:, None]

"""Which points lie in which quadrilaterals."""

from torch import Tensor


def points_in_polygons_forward(points: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Fills `output` with 1 where a point is inside by the even-odd rule, and 0 where it is outside or on the border.

    Args:
        points: B x 2.
        polygons: M x 8, as x y of four corners.
        output: B x M, filled in place.
    """
    x, y = points[:, None].unbind(-1)
    corners = polygons.unflatten(1, (4, 2))
    inside = x.new_zeros(len(points), len(polygons)).bool()
    border = inside.clone()
    for (x1, y1), (x2, y2) in zip(_coordinates(corners), _coordinates(corners.roll(1, 1)), strict=True):
        turn = (x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)  # its sign says on which side of the edge the point lies
        inside ^= ((y1 < y) != (y2 < y)) & ((turn > 0) == (y2 > y1))
        within = (x - x1) * (x - x2) <= 0
        border |= (turn == 0) & within & ((y - y1) * (y - y2) <= 0)
    output.copy_(inside & ~border)


def _coordinates(corners: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x and y of each corner, M each."""
    return [corner.unbind(1) for corner in corners.unbind(1)]

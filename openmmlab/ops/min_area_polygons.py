"""The smallest rectangle around points."""

import math

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._polygons import convex_hull, taken


def min_area_polygons(pointsets: Tensor, polygons: Tensor) -> None:
    """Fills `polygons` with the rectangle of least area around each set of points.

    One of its sides lies along an edge of the convex hull (Freeman and Shapira, 1975): all edges are tried.

    Args:
        pointsets: N x 2P, as x y of each point.
        polygons: N x 8, filled in place with x y of four corners. With the rectangle turned by less than a right angle
            to be upright, they are x2 y1, x1 y1, x1 y2, x2 y2.
    """
    points = pointsets.double().unflatten(1, (-1, 2))
    hull = taken(points, convex_hull(points))
    x, y = (hull.roll(-1, 1) - hull).unbind(-1)
    angle = torch.atan2(y, x).remainder(math.pi / 2)  # N edges
    axes = torch.stack([torch.stack([angle.cos(), angle.sin()], -1), torch.stack([-angle.sin(), angle.cos()], -1)], -2)
    along = torch.einsum("neac,npc->neap", axes, points)  # N edges 2 P
    low, high = along.amin(3), along.amax(3)
    area = (high - low).prod(2)
    # if several rectangles are equally small, as for symmetric points, take the first edge from the lowest point
    best = (area <= area.amin(1, keepdim=True) * (1 + 1e-6)).int().argmax(1)
    rows = torch.arange(len(points), device=points.device)
    low, high, axes = low[rows, best], high[rows, best], axes[rows, best]  # N 2, N 2, N axes 2
    (x1, y1), (x2, y2) = low.unbind(1), high.unbind(1)
    corners = torch.stack([x2, y1, x1, y1, x1, y2, x2, y2], 1).unflatten(1, (4, 2))
    polygons.copy_((corners @ axes).flatten(1))

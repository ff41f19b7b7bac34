"""Plane geometry of many small polygons at once: N x vertices x 2, in double precision."""

from collections.abc import Callable

import torch
from torch import Tensor

# Relative to the polygons' sizes: far above the rounding of doubles, and far below the rounding of single-precision
# inputs, so that a corner on an edge, or an edge on an edge, is recognised.
TOLERANCE = 1e-9


def cross(a: Tensor, b: Tensor) -> Tensor:
    """The cross product of vectors: twice the signed area of the triangle between them."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def signed_area(polygons: Tensor) -> Tensor:
    """The area, positive where the vertices turn from x to y."""
    relative = polygons - polygons[:, :1]  # keeps precision far from the origin
    return cross(relative, relative.roll(-1, 1)).sum(1) / 2


def rotated_corners(boxes: Tensor) -> Tensor:
    """The corners (N 4 2) of boxes given as centre x and y, width, height and angle from x to y in radians."""
    centre, size, angle = boxes.double().split([2, 2, 1], dim=1)
    signs = size.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    right, down = (signs * size[:, None] / 2).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    return centre[:, None] + torch.stack([right * cosine - down * sine, right * sine + down * cosine], -1)


def in_convex(points: Tensor, polygons: Tensor) -> Tensor:
    """Whether each point (N P 2) is in the convex polygon of its row (N V 2) or on its border; false without area."""
    edges = polygons.roll(-1, 1) - polygons
    turn = cross(edges[:, None], points[:, :, None] - polygons[:, None])  # N P V
    area = signed_area(polygons)[:, None]
    inside = turn * area.sign()[..., None] >= -TOLERANCE * edges.square().sum((1, 2))[:, None, None]
    return inside.all(2) & (area != 0)


def in_rectangle(points: Tensor, polygons: Tensor) -> Tensor:
    """Whether each point (N P 2) is in the rectangle spanned by the polygon's first and last side."""
    sides = torch.stack([polygons[:, 1] - polygons[:, 0], polygons[:, -1] - polygons[:, 0]], 1)  # N 2 2
    along = ((points - polygons[:, :1])[:, :, None] * sides[:, None]).sum(3)  # N P 2
    square = sides.square().sum(2)[:, None]
    return ((along >= -TOLERANCE * square) & (along <= (1 + TOLERANCE) * square)).all(2)


def meeting_points(
    first: Tensor, second: Tensor, contains: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The vertices of the intersections of two convex polygons, row by row, unordered.

    They are the crossings of the edges, and the vertices of either polygon in the other.

    Args:
        first: N V 2.
        second: N W 2.
        contains: says which points (N P 2) lie in polygons.

    Returns:
        Candidates, N (V*W + V + W) 2, and which of them are vertices.
    """
    along, other = (polygons.roll(-1, 1) - polygons for polygons in (first, second))
    along, other = along[:, :, None], other[:, None]  # N V 1 2, N 1 W 2
    apart = second[:, None] - first[:, :, None]  # N V W 2
    turn = cross(along, other)
    parallel = turn.abs() <= TOLERANCE * along.norm(dim=3) * other.norm(dim=3)
    turn = turn.masked_fill(parallel, 1)
    on_first, on_second = cross(apart, other) / turn, cross(apart, along) / turn
    crossing = ~parallel
    for share in (on_first, on_second):
        crossing &= (share >= -TOLERANCE) & (share <= 1 + TOLERANCE)
    crossings = first[:, :, None] + along * on_first[..., None]
    points = torch.cat([crossings.flatten(1, 2), first, second], 1)
    return points, torch.cat([crossing.flatten(1), contains(first, second), contains(second, first)], 1)


def only_valid(points: Tensor, valid: Tensor) -> Tensor:
    """The points, with invalid points replaced by a valid point of their row; a single point if none is valid."""
    one = valid.int().argmax(1)[:, None, None].expand(-1, 1, 2)
    return torch.where(valid[..., None], points, points.gather(1, one))


def convex_intersection(first: Tensor, second: Tensor) -> Tensor:
    """The area of the intersection of convex polygons (N V 2, N W 2), row by row."""
    points = only_valid(*meeting_points(first, second, in_convex))
    points = points - points.mean(1, keepdim=True)
    # seen from a point inside, the vertices of a convex polygon are in the order of their angles
    order = torch.atan2(points[..., 1], points[..., 0]).argsort(1)
    return signed_area(points.gather(1, order[..., None].expand_as(points)))


def shares_within(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each edge of a polygon (N V 2) in the convex polygon of its row (N W 2), as shares of its length.

    Returns:
        Start and end, each N V; equal if the edge stays outside.
    """
    edges = first.roll(-1, 1) - first
    borders = (second.roll(-1, 1) - second) * signed_area(second).sign()[:, None, None]
    depth = cross(borders[:, None], first[:, :, None] - second[:, None])  # N V W: how far inside of each border
    slope = cross(borders[:, None], edges[:, :, None])
    parallel = slope.abs() <= TOLERANCE * edges.norm(dim=2)[:, :, None] * borders.norm(dim=2)[:, None]
    outside = (parallel & (depth < -TOLERANCE * borders.square().sum((1, 2))[:, None, None])).any(2)
    share = -depth / slope.masked_fill(parallel, 1)
    start = share.masked_fill(parallel | (slope < 0), 0).amax(2).clamp(min=0)
    end = share.masked_fill(parallel | (slope > 0), 1).amin(2).clamp(max=1)
    return start, torch.where(outside, start, torch.maximum(start, end))


def convex_hull(points: Tensor) -> Tensor:
    """The convex hull (Graham, 1972): points by their angle at the lowest, without the points that bend in.

    Args:
        points: N P 2.

    Returns:
        The indices of its vertices, N x P: from the lowest, turning from x to y; the first is repeated to fill the row.
    """
    number = points.shape[1]
    low = points[..., 1] == points[..., 1].amin(1, keepdim=True)
    first = points[..., 0].masked_fill(~low, torch.inf).argmin(1, keepdim=True)
    arms = points - taken(points, first)
    length = arms.square().sum(2)
    angle = (torch.atan2(arms[..., 1], arms[..., 0]) / TOLERANCE).round()
    # The start comes first, and so do points that differ from it only by rounding: their angle is meaningless.
    angle = angle.masked_fill(length <= TOLERANCE**2 * length.amax(1, keepdim=True), -torch.inf)
    # Among points in one direction (up to rounding), the nearest comes first; on the way back to the start it comes
    # last.
    by_length = torch.where(angle < angle.amax(1, keepdim=True), length, -length).argsort(1)
    hull = by_length.gather(1, angle.gather(1, by_length).argsort(stable=True, dim=1))
    straight = TOLERANCE * length.amax(1)
    place = torch.arange(number, device=points.device)
    left = torch.full_like(first, number)  # vertices that are left
    while True:
        corners = taken(points, hull)
        turn = cross(corners - corners.roll(1, 1), corners.roll(-1, 1) - corners)
        # One at a time: if two points differ only by rounding, either can go, but not both.
        least, worst = turn.masked_fill((place == 0) | (place >= left), torch.inf).min(1)
        gone = least <= straight
        if not gone.any():
            return hull
        following = place + ((place >= worst[:, None]) & gone[:, None])
        hull = torch.cat([hull, first], 1).gather(1, following)
        left = left - gone[:, None].long()


def taken(points: Tensor, indices: Tensor) -> Tensor:
    """The points (N P 2) at indices (N V), N V 2."""
    return points.gather(1, indices[..., None].expand(-1, -1, 2))


def overlapping(first: Tensor, second: Tensor, later: bool = False) -> tuple[Tensor, Tensor]:
    """The pairs of polygons with overlapping upright bounds: few of all pairs, and only these can intersect.

    Args:
        first: N V 2.
        second: M W 2.
        later: whether to give only pairs with a second index greater than the first.

    Returns:
        Indices in `first` and in `second`.
    """
    low, high = first.amin(1), first.amax(1)
    other_low, other_high = second.amin(1), second.amax(1)
    pairs = [torch.empty(0, 2, dtype=torch.long, device=first.device)]
    step = max(1, 2**24 // max(1, len(second)))  # rows at a time
    for begin in range(0, len(first), step):
        part = slice(begin, begin + step)
        overlap = (low[part, None] <= other_high) & (other_low <= high[part, None])
        found = overlap.all(2).nonzero()
        found[:, 0] += begin
        pairs.append(found[found[:, 1] > found[:, 0]] if later else found)
    return torch.cat(pairs).unbind(1)


def pairwise(measure: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, chunk: int = 2**15) -> Tensor:
    """A measure of pairs of polygons, row by row, some at a time to bound memory; N."""
    parts = [measure(*rows) for rows in zip(first.split(chunk), second.split(chunk), strict=True)]
    return torch.cat(parts) if parts else first.new_zeros(0)

"""Distances between line segments in the plane: what paddles and their masks are made of.

Segments are arrays (4, ...): x and y of the start, x and y of the end.
"""

import numpy as np


def to_points(segments: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances of points to segments.

    Args:
        segments: (4, ...), of lengths above 0.
        x, y: coordinates of points, of shapes that broadcast with the segments' other axes.
    """
    ax, ay, bx, by = segments
    dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
    along = (px * dx + py * dy) / (dx * dx + dy * dy)
    along = np.minimum(np.maximum(along, 0), 1)
    px = px - along * dx
    py = py - along * dy
    return px * px + py * py


def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The least squared distance from an end of a segment to the other segment, for (4, ...) that broadcast.

    It is the segments' distance if they do not cross. Segments that cross have an end within half of the shorter
    length, so a limit above half of the length refuses them, too.
    """
    ends = to_points(second, *first[:2]), to_points(second, *first[2:])
    others = to_points(first, *second[:2]), to_points(first, *second[2:])
    return np.minimum(np.minimum(*ends), np.minimum(*others))

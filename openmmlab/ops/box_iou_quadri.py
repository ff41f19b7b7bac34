"""Intersection over union of quadrilaterals, by mmcv's rule."""

from torch import Tensor

from terrazzo.openmmlab.ops._overlaps import fill_overlaps, overlaps
from terrazzo.openmmlab.ops._polygons import convex_hull, in_rectangle, meeting_points, only_valid, signed_area, taken


def box_iou_quadri(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Fills `ious` with the overlaps of boxes.

    Args:
        boxes1: N x 8, as x y of four corners.
        boxes2: M x 8.
        ious: N * M, or N if aligned; filled in place; 0 for a box without area.
        mode_flag: 0 intersection over union, 1 over the area of the first box.
        aligned: whether to take box i with box i only (N = M).
    """
    fill_overlaps(quadri_corners(boxes1), quadri_corners(boxes2), ious, mode_flag, aligned, quadri_overlaps)


def quadri_corners(boxes: Tensor) -> Tensor:
    """N x 8 as N 4 2."""
    return boxes.double().unflatten(1, (4, 2))


def quadri_overlaps(first: Tensor, second: Tensor, mode: int = 0) -> Tensor:
    """The overlap of each quadrilateral (N 4 2) with the quadrilateral of the same row; N.

    It is exact for rectangles. For other shapes it equals compiled mmcv on the CPU: a corner counts as inside a
    quadrilateral if it is inside the rectangle spanned by the first and last side, which overestimates.
    """
    points = only_valid(*meeting_points(first, second, in_rectangle))
    return overlaps(_area(first), _area(second), signed_area(taken(points, convex_hull(points))), mode)


def _area(corners: Tensor) -> Tensor:
    """The areas of the two triangles at the first corner, both counted as positive."""
    return signed_area(corners[:, :3]).abs() + signed_area(corners[:, [0, 2, 3]]).abs()

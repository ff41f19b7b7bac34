"""Intersection over union of rotated boxes."""

from torch import Tensor

from terrazzo.openmmlab.ops._overlaps import fill_overlaps, overlaps
from terrazzo.openmmlab.ops._polygons import convex_intersection, rotated_corners, signed_area


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Fills `ious` with the overlaps of boxes.

    Args:
        boxes1: N x 5 or more, as centre x and y, width, height, angle from x to y in radians; further columns, such as
            the score in mmrotate's evaluation, are not used.
        boxes2: M x 5 or more.
        ious: N * M, or N if aligned; filled in place; 0 for a box without area.
        mode_flag: 0 intersection over union, 1 over the area of the first box.
        aligned: whether to take box i with box i only (N = M).
    """
    first, second = rotated_corners(boxes1[:, :5]), rotated_corners(boxes2[:, :5])
    fill_overlaps(first, second, ious, mode_flag, aligned, rotated_overlaps)


def rotated_overlaps(first: Tensor, second: Tensor, mode: int = 0) -> Tensor:
    """The overlap of each rectangle (N 4 2) with the rectangle of the same row; N."""
    areas = signed_area(first).abs(), signed_area(second).abs()
    return overlaps(*areas, convex_intersection(first, second), mode)

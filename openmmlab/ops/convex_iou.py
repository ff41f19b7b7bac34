"""Overlaps of the convex hulls of points with convex quadrilaterals (Guo et al., CFA, 2021)."""

import torch
from torch import Tensor

from terrazzo.openmmlab.ops._numerics import gradients
from terrazzo.openmmlab.ops._overlaps import UNION, fill_overlaps, overlaps
from terrazzo.openmmlab.ops._polygons import convex_hull, convex_intersection, cross, shares_within, signed_area, taken


def convex_iou(pointsets: Tensor, polygons: Tensor, ious: Tensor) -> None:
    """Fills `ious` with intersections over unions.

    Args:
        pointsets: N x 2P, as x y of each point.
        polygons: K x 8, as x y of four corners, convex.
        ious: N x K, filled in place.
    """
    points = pointsets.double().unflatten(1, (-1, 2))
    hulls = taken(points, convex_hull(points))
    fill_overlaps(hulls, polygons.double().unflatten(1, (4, 2)), ious, UNION, False, _overlaps)


def convex_giou(pointsets: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Fills `output` with the generalised intersection over union (Rezatofighi et al., 2019) and its gradient.

    Args:
        pointsets: N x 18, as x y of nine points.
        polygons: N x 8, as x y of four corners, convex.
        output: N x 19, filled in place with the gradient with respect to `pointsets` and, last, the value.
    """
    points, others = pointsets.double().unflatten(1, (-1, 2)), polygons.double().unflatten(1, (4, 2))
    values = _generalised(points, others)
    (gradient,) = gradients(lambda points: _generalised(points, others), (points,), torch.ones_like(values))
    output.copy_(torch.cat([gradient.flatten(1), values[:, None]], 1))


def _overlaps(first: Tensor, second: Tensor, mode: int) -> Tensor:
    return overlaps(signed_area(first), signed_area(second).abs(), convex_intersection(first, second), mode)


def _generalised(points: Tensor, polygons: Tensor) -> Tensor:
    """The generalised intersection over union of each hull with the polygon of the same row; N, differentiable."""
    hulls = taken(points, convex_hull(points.detach()))
    intersection = _intersection(hulls, polygons)
    union = signed_area(hulls) + signed_area(polygons).abs() - intersection
    every = torch.cat([points, polygons], 1)
    around = signed_area(taken(every, convex_hull(every.detach())))
    return intersection / union - (around - union) / around


def _intersection(hulls: Tensor, polygons: Tensor) -> Tensor:
    """The area of the intersections, differentiable in the hulls.

    An area changes by what its border sweeps over: here, the parts of the hull's edges inside the polygon. This is well
    defined even if vertices of the intersection coincide; the area does not depend on their order.
    """
    start, end = (share[..., None] for share in shares_within(hulls.detach(), polygons))
    edges = hulls.roll(-1, 1) - hulls
    middle = hulls + edges * (start + end) / 2
    swept = cross(middle, (edges * (end - start)).detach()).sum(1)
    return convex_intersection(hulls.detach(), polygons) + swept - swept.detach()

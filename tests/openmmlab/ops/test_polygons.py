"""Overlaps of rotated boxes and polygons, compared with plain clipping, and the operators on points."""

import itertools
import math

import pytest
import torch

import terrazzo.openmmlab  # noqa: F401
from terrazzo.openmmlab.ops._polygons import convex_hull, rotated_corners, taken


def area(polygon):
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2


def clip(subject, polygon):
    """The part of a polygon inside a convex polygon, clipped side by side (Sutherland and Hodgman, 1974)."""
    if area(polygon) < 0:
        polygon = polygon[::-1]
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        depth = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in subject]
        kept = []
        for index, (point, inside) in enumerate(zip(subject, depth, strict=True)):
            before, earlier = subject[index - 1], depth[index - 1]
            if (inside >= 0) != (earlier >= 0):
                share = earlier / (earlier - inside)
                kept.append(tuple(a + share * (b - a) for a, b in zip(before, point, strict=True)))
            if inside >= 0:
                kept.append(point)
        subject = kept
    return subject


def plain_overlap(first, second, mode="iou"):
    inter, areas = abs(area(clip(first, second))), [abs(area(first)), abs(area(second))]
    return inter / (areas[0] if mode == "iof" else sum(areas) - inter)


def rectangle(x, y, width, height, angle):
    turn = complex(math.cos(angle), math.sin(angle))
    corners = [complex(i * width, j * height) * turn / 2 for i, j in [(-1, -1), (1, -1), (1, 1), (-1, 1)]]
    return [(x + corner.real, y + corner.imag) for corner in corners]


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    return boxes * torch.tensor([9, 9, 8, 8, 8]) + torch.tensor([0, 0, 0.2, 0.2, -4])


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("clockwise", [True, False])
def test_box_iou_rotated(mode, clockwise):
    from mmcv.ops import box_iou_rotated

    first, second = random_boxes(12, 0), random_boxes(12, 1)
    way = torch.tensor([1, 1, 1, 1, 1 if clockwise else -1])
    plain = [[rectangle(*box) for box in (boxes * way).tolist()] for boxes in (first, second)]
    expected = torch.tensor([[plain_overlap(a, b, mode) for b in plain[1]] for a in plain[0]], dtype=torch.float64)
    assert 20 < (expected > 0).sum() < 140
    torch.testing.assert_close(box_iou_rotated(first, second, mode, clockwise=clockwise), expected)
    aligned = box_iou_rotated(first, second, mode, aligned=True, clockwise=clockwise)
    torch.testing.assert_close(aligned, expected.diagonal())
    if clockwise:  # mmcv turns boxes of five columns only
        scored = torch.nn.functional.pad(first, (0, 1), value=0.5)
        torch.testing.assert_close(box_iou_rotated(scored, second, mode), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_box_iou_rotated_where_borders_coincide(dtype):
    """Boxes may be equal, have swapped sides, be turned by right angles, contain each other, touch, or be empty."""
    from mmcv.ops import box_iou_rotated

    for angle in (0.0, 0.3, math.pi / 4, 1.5, -2.0):
        for turn, sides in itertools.product(range(-4, 5), ((4.0, 2.0), (3.0, 3.0))):
            box = torch.tensor([[5.0, 5.0, *sides, angle]], dtype=torch.float64)
            other = box[:, [0, 1, 3, 2, 4]] if turn % 2 else box.clone()
            other[:, 4] += turn * math.pi / 2
            tolerance = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
            overlap = box_iou_rotated(box.to(dtype), other.to(dtype))
            assert overlap.dtype == dtype
            assert abs(overlap.item() - 1) < tolerance, (angle, turn, sides)
    boxes = torch.tensor([[2.0, 2, 4, 4, 0], [2, 2, 2, 2, 0], [1, 2, 2, 4, 0], [6, 2, 4, 4, 0], [2, 2, 0, 4, 0]])
    overlaps = box_iou_rotated(boxes.to(dtype), boxes.to(dtype))
    assert overlaps[0].tolist() == [1, 0.25, 0.5, 0, 0]


@pytest.mark.parametrize("name", ["box_iou_rotated", "box_iou_quadri"])
def test_overlaps_where_borders_coincide_but_for_rounding(name):
    """A box overlaps itself turned by a right angle, and a box of half its length that shares three sides."""
    import mmcv.ops as ops

    boxes = random_boxes(2000, 6)
    turned = boxes[:, [0, 1, 3, 2, 4]] + torch.tensor([0, 0, 0, 0, math.pi / 2], dtype=torch.float64)
    half = boxes.clone()
    half[:, 0] -= boxes[:, 2] / 4 * boxes[:, 4].cos()
    half[:, 1] -= boxes[:, 2] / 4 * boxes[:, 4].sin()
    half[:, 2] /= 2
    for other, expected in ((turned, 1.0), (half, 0.5)):
        pair = (boxes, other)
        if name == "box_iou_quadri":
            pair = tuple(rotated_corners(part).flatten(1) for part in pair)
        overlaps = getattr(ops, name)(*pair, aligned=True)
        torch.testing.assert_close(overlaps, torch.full_like(overlaps, expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["box_iou_rotated", "box_iou_quadri"])
def test_overlaps_of_nothing_and_of_strided_boxes(name):
    import mmcv.ops as ops

    overlaps = getattr(ops, name)
    boxes = random_boxes(6, 0) if name == "box_iou_rotated" else rotated_corners(random_boxes(6, 0)).flatten(1)
    assert overlaps(boxes[:0], boxes).shape == (0, 6)
    assert overlaps(boxes, boxes[:0]).shape == (6, 0)
    assert overlaps(boxes[:0], boxes[:0], aligned=True).shape == (0,)
    torch.testing.assert_close(overlaps(boxes.T.contiguous().T, boxes), overlaps(boxes, boxes))


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_box_iou_quadri_of_rectangles(mode):
    from mmcv.ops import box_iou_quadri, box_iou_rotated

    first, second = random_boxes(40, 2), random_boxes(30, 3)
    corners = [rotated_corners(boxes).flatten(1) for boxes in (first, second)]
    expected = box_iou_rotated(first, second, mode)
    torch.testing.assert_close(box_iou_quadri(*corners, mode), expected)
    backwards = corners[0].view(-1, 4, 2).flip(1).flatten(1)
    torch.testing.assert_close(box_iou_quadri(backwards, corners[1], mode), expected)


def test_box_iou_quadri_of_other_quadrilaterals_is_as_mmcv_has_it():
    """The corner (2, 4) counts as inside the first shape: it is in the rectangle over the first and last side."""
    from mmcv.ops import box_iou_quadri

    first = torch.tensor([[1.0, 1, 3, 4, 4, 4, 4, 1]])
    second = torch.tensor([[2.0, 1, 2, 4, 4, 4, 4, 1]])
    torch.testing.assert_close(box_iou_quadri(first, second), torch.tensor([[1.0]]))


def plain_hull(points):
    """The vertices of the convex hull, from the lowest vertex, by the monotone chain."""
    points = sorted(set(points), key=lambda point: (point[1], point[0]))
    chains = []
    for ordered in (points, points[::-1]):
        chain = []
        for x, y in ordered:
            while len(chain) > 1:
                (x1, y1), (x2, y2) = chain[-2:]
                if (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        chains += chain[:-1]
    return chains


def test_convex_hull():
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randn(40, 12, 2, generator=generator, dtype=torch.float64)
    lattice = torch.randint(0, 4, (200, 12, 2), generator=generator).double()  # with duplicates and collinear points
    for points in (scattered, lattice):
        for row, hull in zip(points, taken(points, convex_hull(points)), strict=True):
            expected = plain_hull([tuple(point) for point in row.tolist()])
            found = [tuple(point) for point in hull.tolist()]
            assert found[: len(expected)] == expected
            assert set(found[len(expected) :]) <= {expected[0]}
    same = torch.ones(2, 5, 2, dtype=torch.float64)
    assert (taken(same, convex_hull(same)) == 1).all()


def test_convex_iou():
    from mmcv.ops import convex_iou

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(8, 9, 2, generator=generator, dtype=torch.float64) * 8
    polygons = rotated_corners(random_boxes(6, 4))
    hulls = [plain_hull([tuple(point) for point in row]) for row in points.tolist()]
    others = [[tuple(corner) for corner in polygon] for polygon in polygons.tolist()]
    expected = torch.tensor([[plain_overlap(a, b) for b in others] for a in hulls], dtype=torch.float64)
    torch.testing.assert_close(convex_iou(points.flatten(1), polygons.flatten(1)), expected)
    torch.testing.assert_close(convex_iou(points.flatten(1), polygons.flip(1).flatten(1)), expected)
    assert convex_iou(points.flatten(1)[:0], polygons.flatten(1)).shape == (0, 6)


def test_convex_giou_and_its_gradient():
    from mmcv.ops import convex_giou

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(12, 9, 2, generator=generator, dtype=torch.float64) * 8
    points[0] += 20  # outside
    polygons = rotated_corners(random_boxes(12, 4))
    points[1] = polygons[1].repeat(3, 1)[:9] * 0.5 + polygons[1].mean(0) * 0.5  # inside, with duplicate points

    def value(row, points):
        hull = plain_hull([tuple(point) for point in points.tolist()])
        polygon = [tuple(corner) for corner in polygons[row].tolist()]
        inter = abs(area(clip(hull, polygon)))
        union = area(hull) + abs(area(polygon)) - inter
        around = area(plain_hull(hull + polygon))
        return inter / union - (around - union) / around

    values, gradient = convex_giou(points.flatten(1), polygons.flatten(1))
    for row in range(12):
        assert math.isclose(values[row], value(row, points[row]), abs_tol=1e-9)
        for place in range(18) if row != 1 else ():
            step = torch.zeros(18, dtype=torch.float64)
            step[place] = 1e-6
            step = step.view(9, 2)
            slope = (value(row, points[row] + step) - value(row, points[row] - step)) / 2e-6
            assert math.isclose(gradient[row, place], slope, rel_tol=1e-4, abs_tol=1e-7)
    assert torch.isfinite(gradient).all()


def test_convex_giou_gradient_where_a_corner_touches_an_edge():
    """The square's corner (3, 3) lies on an edge of the hull; moving it changes the area to second order only."""
    from mmcv.ops import convex_giou

    points = torch.tensor([[1.5, 1.5, 3.5, 1.5, 3.5, 2.5, 2.5, 3.5, 1.5, 3.5, *[2.0] * 8]])
    values, gradient = convex_giou(points, torch.tensor([[1.0, 1, 1, 3, 3, 3, 3, 1]]))
    torch.testing.assert_close(values, torch.tensor([0.3831]), rtol=0, atol=1e-4)
    expected = [-0.1848, -0.1848, -0.0801, -0.1076, -0.0734, -0.0367, -0.0367, -0.0734, -0.1076, -0.0801, *[0.0] * 8]
    torch.testing.assert_close(gradient, torch.tensor([expected]), rtol=0, atol=1e-4)


def test_min_area_polygons():
    from mmcv.ops import min_area_polygons

    points = torch.randn(20, 9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corners = min_area_polygons(points.flatten(1)).view(20, 4, 2)
    sides = corners.roll(-1, 1) - corners
    assert (sides * sides.roll(-1, 1)).sum(2).abs().max() < 1e-12  # right angles
    found = sides[:, 0].norm(dim=1) * sides[:, 1].norm(dim=1)
    angles = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)
    for box, row, rectangle_area in zip(corners, points, found, strict=True):
        axes = torch.stack([torch.stack([angles.cos(), angles.sin()]), torch.stack([-angles.sin(), angles.cos()])])
        along = row @ axes
        areas = (along.amax(1) - along.amin(1)).prod(0)
        assert rectangle_area <= areas.min()
        assert areas.min() < 1.01 * rectangle_area
        middle, half = box.mean(0), (box - box.roll(1, 0))[:2]
        for side in half:
            assert (((row - middle) @ side).abs() <= side.square().sum() / 2 + 1e-9).all()  # no point is outside
    square = torch.tensor([[0.0, 0, 2, 0, 2, 1, 0, 1, 1, 0.5, 1, 1, 0, 0, 2, 1, 1, 0]])
    assert min_area_polygons(square).tolist() == [[2, 0, 0, 0, 0, 1, 2, 1]]
    assert min_area_polygons(square.half()).dtype == torch.float16
    assert min_area_polygons(square[:0]).shape == (0, 8)


def test_points_in_polygons():
    from mmcv.ops import points_in_polygons

    boxes = random_boxes(7, 5)
    polygons = rotated_corners(boxes)
    polygons[6] = torch.tensor([[0.0, 0], [8, 0], [2, 2], [0, 8]])  # not convex
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    relative = points[:, None] - boxes[:, :2]
    cosine, sine = boxes[:, 4].cos(), boxes[:, 4].sin()
    across = (relative[..., 0] * cosine + relative[..., 1] * sine).abs() < boxes[:, 2] / 2
    down = (relative[..., 1] * cosine - relative[..., 0] * sine).abs() < boxes[:, 3] / 2
    expected = across & down
    x, y = points.unbind(1)
    expected[:, 6] = (x + 3 * y < 8) | (3 * x + y < 8)
    found = points_in_polygons(points.float(), polygons.flatten(1).float())
    assert found.dtype == torch.float32
    assert torch.equal(found.bool(), expected)
    assert expected.any(0).all()
    strided = points_in_polygons(points.float().T.contiguous().T, polygons.flip(1).flatten(1).float())
    assert torch.equal(strided, found)
    border = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 0.5]])
    inside = points_in_polygons(border, torch.tensor([[0.0, 0, 2, 0, 2, 2, 0, 2]]))
    assert inside[:, 0].tolist() == [0, 0, 1, 0]
    assert points_in_polygons(border[:0], torch.zeros(3, 8)).shape == (0, 3)


def test_diff_iou_rotated():
    from mmcv.ops import diff_iou_rotated_2d

    first, second = random_boxes(40, 2), random_boxes(40, 3)
    second[:3] = first[:3]  # equal boxes have each corner twice
    second[3, :4] = first[3, :4]  # a turned copy has eight corners
    second[4, 2:4] = 0.01  # a small box, mostly inside
    first, second = first[None].requires_grad_(), second[None].requires_grad_()
    found = diff_iou_rotated_2d(first, second)
    expected = [
        plain_overlap(rectangle(*a), rectangle(*b)) for a, b in zip(first[0].tolist(), second[0].tolist(), strict=True)
    ]
    assert sum(value > 0 for value in expected) > 10
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert torch.isfinite(first.grad).all()
    assert (first.grad[0, [index for index, value in enumerate(expected) if 0 < value < 0.99]] != 0).any(-1).all()


def test_chamfer_distance():
    from mmcv.ops import chamfer_distance

    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, count, 2, generator=generator, requires_grad=True) for count in (5, 7))
    weights = [torch.rand(2, count, generator=generator) for count in (5, 7)]
    found = chamfer_distance(first, second)
    plain = torch.cdist(first, second).square()
    for got, dim, index in ((0, 2, 2), (1, 1, 3)):
        nearest = plain.min(dim)
        torch.testing.assert_close(found[got], nearest.values)
        assert torch.equal(found[index].long(), nearest.indices)
    gradients = torch.autograd.grad(sum((d * w).sum() for d, w in zip(found, weights)), (first, second))
    values = plain.min(2).values, plain.min(1).values
    expected = torch.autograd.grad(sum((d * w).sum() for d, w in zip(values, weights)), (first, second))
    torch.testing.assert_close(gradients, expected)

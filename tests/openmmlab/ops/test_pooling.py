"""The pooling operators and their gradients, compared with loops over their definitions."""

import importlib
import math

import pytest
import torch
from torch.autograd import grad, gradcheck

import terrazzo.openmmlab  # noqa: F401

SIZE = (3, 2)
BOXES = [
    [0, 2.0, 3.0, 20.0, 17.0],
    [1, 0.0, 0.0, 31.0, 23.0],
    [1, -9.0, -9.0, 12.0, 50.0],
    [0, 28.0, 20.0, 44.0, 60.0],
    [0, 5.0, 5.0, 5.5, 5.5],
]
ROTATED = [
    [0, 12.0, 10.0, 14.0, 9.0, 0.4],
    [1, 15.0, 11.0, 30.0, 20.0, -1.9],
    [1, 2.0, 22.0, 25.0, 40.0, 2.8],
    [0, 8.0, 8.0, 1.0, 0.5, 7.0],
]


def maps(batch=2, channels=3):
    torch.manual_seed(0)
    return torch.randn(batch, channels, 6, 8, dtype=torch.float64, requires_grad=True)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def bilinear(plane, y, x):
    """The sample of a map (C H W) at a real position; it is 0 at more than a pixel outside."""
    height, width = plane.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(len(plane))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = (1 - (x - left)) * plane[:, top, left] + (x - left) * plane[:, top, right]
    lower = (1 - (x - left)) * plane[:, bottom, left] + (x - left) * plane[:, bottom, right]
    return (1 - (y - top)) * upper + (y - top) * lower


def assert_same_with_gradient(result, expected, features):
    torch.testing.assert_close(result, expected)
    weight = torch.randn_like(result)
    torch.testing.assert_close(*(grad((value * weight).sum(), features)[0] for value in (result, expected)))


def by_bins(rois, size, sample):
    """Stack the values of `sample` for each region and bin: (N, C, rows, columns)."""
    values = [[[sample(roi, row, column) for column in range(size[1])] for row in range(size[0])] for roi in rois]
    return torch.stack([torch.stack([torch.stack(line) for line in roi]) for roi in values]).permute(0, 3, 1, 2)


def grid(bin_height, bin_width, ratio):
    rows, columns = ratio or math.ceil(bin_height), ratio or math.ceil(bin_width)
    return [((i + 0.5) / rows, (j + 0.5) / columns) for i in range(rows) for j in range(columns)]


def test_roi_pool():
    from mmcv.ops import roi_pool

    features, scale = maps(), 0.25
    empty = [[0, 60.0, 40.0, 80.0, 60.0], [0, 9.0, 9.0, 3.0, 12.0]]  # outside the map; with negative width

    def sample(roi, row, column):
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        if x2 <= x1 or y2 <= y1:
            return features.new_zeros(3)
        height, width = (y2 - y1) / SIZE[0], (x2 - x1) / SIZE[1]
        top, bottom = max(math.floor(y1 + row * height), 0), max(math.ceil(y1 + (row + 1) * height), 0)
        left, right = max(math.floor(x1 + column * width), 0), max(math.ceil(x1 + (column + 1) * width), 0)
        part = features[int(roi[0]), :, top:bottom, left:right].flatten(1)
        return part.amax(1) if part.numel() else features.new_zeros(3)

    rois = BOXES + empty
    result = roi_pool(features, double(rois), SIZE, scale)
    assert_same_with_gradient(result, by_bins(rois, SIZE, sample), features)
    assert not result[-2:].any()


def plain_rotated(features, rois, scale, ratio, aligned, clockwise):
    def sample(roi, row, column):
        batch, x, y, width, height, angle = roi
        shift = 0.5 if aligned else 0
        x, y, width, height = x * scale - shift, y * scale - shift, width * scale, height * scale
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        angle = -angle if clockwise else angle
        values = []
        for i, j in grid(height / SIZE[0], width / SIZE[1], ratio):
            down, across = ((row + i) / SIZE[0] - 0.5) * height, ((column + j) / SIZE[1] - 0.5) * width
            place = complex(across, -down) * complex(math.cos(angle), math.sin(angle))  # up is the imaginary axis
            values.append(bilinear(features[int(batch)], y - place.imag, x + place.real))
        return torch.stack(values).mean(0)

    return by_bins(rois, SIZE, sample)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize(("aligned", "clockwise"), [(True, False), (False, True)])
def test_roi_align_rotated(ratio, aligned, clockwise):
    from mmcv.ops import roi_align_rotated

    features = maps()
    result = roi_align_rotated(features, double(ROTATED), SIZE, 0.25, ratio, aligned, clockwise)
    assert_same_with_gradient(result, plain_rotated(features, ROTATED, 0.25, ratio, aligned, clockwise), features)


def test_roi_align_rotated_by_no_angle_is_roi_align():
    from mmcv.ops import roi_align, roi_align_rotated

    features, boxes = maps(), double(BOXES)
    size = boxes[:, 3:] - boxes[:, 1:3]
    rotated = torch.cat([boxes[:, :1], boxes[:, 1:3] + size / 2, size, torch.zeros(5, 1)], 1)
    result = roi_align_rotated(features, rotated, SIZE, 0.25, 2, True, False)
    torch.testing.assert_close(result, roi_align(features, boxes, SIZE, 0.25, 2, "avg", True))


@pytest.mark.parametrize("clockwise", [True, False])
def test_riroi_align_rotated(clockwise):
    from mmcv.ops import riroi_align_rotated

    features, orientations = maps(channels=8), 4
    result = riroi_align_rotated(features, double(ROTATED), SIZE, 0.25, 2, orientations, clockwise)
    pooled = plain_rotated(features, ROTATED, 0.25, 2, False, clockwise).unflatten(1, (2, orientations))
    expected = []
    for roi, (*_, angle) in zip(pooled, ROTATED, strict=True):
        steps = angle / (2 * math.pi) * orientations
        whole = math.floor(steps)
        share = steps - whole
        expected.append((1 - share) * roi.roll(whole, 1) + share * roi.roll(whole - 1, 1))
    assert_same_with_gradient(result, torch.stack(expected).flatten(1, 2), features)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("shifted", [True, False])
def test_deform_roi_pool(ratio, shifted):
    from mmcv.ops import deform_roi_pool

    features, scale, gamma = maps(), 0.25, 0.1
    offset = torch.randn(len(BOXES), 2, *SIZE, dtype=torch.float64) if shifted else None

    def sample(roi, row, column):
        x1, y1, x2, y2 = (value * scale - 0.5 for value in roi[1:])
        height, width = y2 - y1, x2 - x1
        if shifted:
            across, down = offset[BOXES.index(roi), :, row, column].tolist()
            x1, y1 = x1 + gamma * width * across, y1 + gamma * height * down
        places = grid(height / SIZE[0], width / SIZE[1], ratio)
        values = [
            bilinear(features[int(roi[0])], y1 + (row + i) * height / SIZE[0], x1 + (column + j) * width / SIZE[1])
            for i, j in places
        ]
        return torch.stack(values).mean(0)

    result = deform_roi_pool(features, double(BOXES), offset, SIZE, scale, ratio, gamma)
    assert_same_with_gradient(result, by_bins(BOXES, SIZE, sample), features)


def test_deform_roi_pool_gradients():
    from mmcv.ops import deform_roi_pool

    features, rois = maps(channels=1), double(BOXES)
    offset = torch.randn(len(BOXES), 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, o: deform_roi_pool(x, rois, o, (2, 2), 0.25, 2, 0.1), (features, offset))


def test_prroi_pool_is_the_integral_of_the_interpolated_map():
    from mmcv.ops import prroi_pool

    features, scale = maps(), 0.25

    def hats(start, size, pixels):
        """The mean over an interval of the hat max(0, 1 - |u|) around each pixel, by the midpoint rule."""
        places = start + size * (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000
        return (1 - (places - torch.arange(pixels)).abs()).clamp(min=0).mean(0)

    def sample(roi, row, column):
        x1, y1, x2, y2 = (value * scale for value in roi[1:])
        height, width = (y2 - y1) / SIZE[0], (x2 - x1) / SIZE[1]
        down, across = hats(y1 + row * height, height, 6), hats(x1 + column * width, width, 8)
        return torch.einsum("chw,h,w->c", features[int(roi[0])], down, across)

    rois = [*BOXES, [0, 16.0, -10.0, 45.0, 12.0]]
    result = prroi_pool(features.float(), double(rois).float(), SIZE, scale)
    expected = by_bins(rois, SIZE, sample)
    weight = torch.randn_like(result)
    gradients = [grad((value * weight.to(value)).sum(), features)[0] for value in (result, expected)]
    for values in ((result.double(), expected), gradients):
        torch.testing.assert_close(*values, rtol=0, atol=1e-5)


def test_prroi_pool_gradient_of_regions():
    ext = importlib.import_module("mmcv._ext")
    features, rois = maps().detach(), double([*BOXES[:3], [0, 4.0, 8.0, 4.0, 16.0]])  # the last region has no area

    def pool(regions):
        output = torch.full((len(rois), 3, *SIZE), torch.nan, dtype=torch.float64)
        ext.prroi_pool_forward(features, regions, output, *SIZE, 0.25)
        return output

    output = pool(rois)
    assert not output[3].any()
    weight = torch.randn_like(output)
    gradient = torch.full_like(rois, torch.nan)
    ext.prroi_pool_coor_backward(output, weight, features, rois, gradient, *SIZE, 0.25)
    assert not gradient[:, 0].any()
    assert not gradient[3].any()
    for row in range(3):
        for column in range(1, 5):
            step = torch.zeros_like(rois)
            step[row, column] = 1e-5
            slope = ((pool(rois + step) - pool(rois - step)) * weight).sum() / 2e-5
            assert math.isclose(gradient[row, column], slope, rel_tol=1e-4, abs_tol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_border_align(steps):
    from mmcv.ops import border_align

    features = maps(channels=8)
    boxes = torch.rand(2, 7, 4, dtype=torch.float64) * 8 - 1.5
    expected = torch.zeros(2, 2, 7, 4, dtype=torch.float64)
    for batch, number, side in ((b, k, s) for b in range(2) for k in range(7) for s in range(4)):
        x1, y1, x2, y2 = boxes[batch, number].tolist()
        ends = [((x1, y1), (x2, y1)), ((x1, y1), (x1, y2)), ((x2, y2), (x1, y2)), ((x2, y2), (x2, y1))][side]
        plane = features[batch, 2 * side : 2 * side + 2]
        samples = [
            bilinear(plane, *(a + (b - a) * step / steps for a, b in reversed(list(zip(*ends, strict=True)))))
            for step in range(steps + 1)
        ]
        expected[batch, :, number, side] = torch.stack(samples).max(0).values
    assert_same_with_gradient(border_align(features, boxes, steps), expected, features)


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(points):
    from mmcv.ops import rotated_feature_align

    features, scale = maps(), 0.25
    boxes = torch.rand(2, 6, 8, 5, dtype=torch.float64) * 30 - 5
    expected = features.clone()
    for batch, row, column in ((b, i, j) for b in range(2) for i in range(6) for j in range(8)):
        y, x, width, height, angle = boxes[batch, row, column].tolist()
        corners = [(1, 1), (-1, 1), (-1, -1), (1, -1)] if points == 5 else []
        for across, down in [(0, 0), *corners]:
            place = complex(across * width, down * height) * complex(math.cos(angle), math.sin(angle)) / 2
            value = bilinear(features[batch], (y + place.imag) * scale, (x + place.real) * scale)
            expected[batch, :, row, column] = expected[batch, :, row, column] + value
    assert_same_with_gradient(rotated_feature_align(features, boxes, scale, points), expected, features)


def test_active_rotated_filter():
    from mmcv.ops import active_rotated_filter

    torch.manual_seed(0)
    filters = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(18) + 1 for _ in range(4)], 1).view(2, 3, 3, 4).int()
    expected = torch.zeros(3, 4, 2, 18, dtype=torch.float64)
    for entry, rotation in ((entry, rotation) for entry in range(18) for rotation in range(4)):
        place = indices.view(18, 4)[entry, rotation] - 1
        expected[:, rotation, :, place] = filters.view(3, 2, 18)[:, :, entry]
    expected = expected.view(12, 4, 3, 3)
    assert_same_with_gradient(active_rotated_filter(filters, indices), expected, filters)


def operators():
    import mmcv.ops as ops

    boxes, rotated = double(BOXES), double(ROTATED)
    return {
        "roi_pool": (lambda x, r: ops.roi_pool(x, r, SIZE, 0.25), boxes),
        "roi_align_rotated": (lambda x, r: ops.roi_align_rotated(x, r, SIZE, 0.25, 0), rotated),
        "riroi_align_rotated": (lambda x, r: ops.riroi_align_rotated(x, r, SIZE, 0.25, 0, 4), rotated),
        "deform_roi_pool": (lambda x, r: ops.deform_roi_pool(x, r, None, SIZE, 0.25, 0), boxes),
        "prroi_pool": (lambda x, r: ops.prroi_pool(x.float(), r.float(), SIZE, 0.25), boxes),
    }


@pytest.mark.parametrize(
    "name", ["roi_pool", "roi_align_rotated", "riroi_align_rotated", "deform_roi_pool", "prroi_pool"]
)
def test_nothing_half_precision_and_strides(name):
    operator, rois = operators()[name]
    features = maps(channels=8).detach().float().requires_grad_()
    empty = operator(features, rois[:0].float())
    assert empty.shape == (0, 8, *SIZE)
    empty.sum().backward()
    assert not features.grad.any()
    expected = operator(features, rois.float())
    strided = features.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    result = operator(strided, rois.float().T.contiguous().T)
    torch.testing.assert_close(result, expected)
    if name != "prroi_pool":  # mmcv's Python code loses this gradient if it copies its input
        result, expected = (value.transpose(2, 3).square().sum() for value in (result, expected))
        torch.testing.assert_close(grad(result, strided), grad(expected, features))
    for dtype in (torch.float16, torch.bfloat16):
        reduced = features.detach().to(dtype).requires_grad_()
        result = operator(reduced, rois.to(dtype))
        assert result.dtype == (torch.float32 if name == "prroi_pool" else dtype)
        expected = operator(reduced.float(), rois.to(dtype).float())  # computed in float32, rounded at the end
        torch.testing.assert_close(result, expected.to(result.dtype), rtol=0, atol=0)
        result.sum().backward()
        assert reduced.grad.dtype == dtype
        assert torch.isfinite(reduced.grad).all()
        assert reduced.grad.any()

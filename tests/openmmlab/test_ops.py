"""mmcv's operators as terrazzo provides them, against slow plain definitions."""

import importlib.util
import math
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from support.processes import run_code

import terrazzo.openmmlab  # noqa: F401
from terrazzo.errors import BackendError


def iou(a, b, offset):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def boxes_and_scores(count=40):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 2, generator=generator) * 40
    sizes = torch.rand(count, 2, generator=generator) * 30 + 1
    return torch.cat([corners, corners + sizes], 1), torch.rand(count, generator=generator)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms(offset, threshold):
    from mmcv.ops import nms

    boxes, scores = boxes_and_scores()
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if all(iou(boxes[index].tolist(), boxes[other].tolist(), offset) <= threshold for other in kept):
            kept.append(index)
    dets, indices = nms(boxes, scores, threshold, offset=offset)
    assert indices.tolist() == kept
    torch.testing.assert_close(dets, torch.cat([boxes[kept], scores[kept][:, None]], 1))


def test_nms_offset_matters():
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 0, 14, 9]])  # overlap 4/14 = 0.286, and 5/15 = 0.333 counted in pixels
    scores = torch.tensor([0.9, 0.8])
    assert len(nms(boxes, scores, 0.3, offset=0)[1]) == 2
    assert len(nms(boxes, scores, 0.3, offset=1)[1]) == 1


def test_nms_of_nothing_and_of_half_precision():
    from mmcv.ops import batched_nms, nms

    assert len(nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1]) == 0
    boxes, scores = boxes_and_scores()
    for dtype in (torch.float16, torch.bfloat16):
        assert len(nms(boxes.to(dtype), scores.to(dtype), 0.5)[1])
    labels = torch.arange(40) % 3
    dets, kept = batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.3})
    assert len(dets) == len(kept) > len(nms(boxes, scores, 0.3)[1])


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(method, offset):
    from mmcv.ops import soft_nms

    boxes, scores = boxes_and_scores()
    left = dict(enumerate(scores.tolist()))
    expected = []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for index in list(left):
            overlap = iou(boxes[best].tolist(), boxes[index].tolist(), offset)
            if method == "gaussian":
                left[index] *= math.exp(-(overlap**2) / 0.5)
            elif overlap >= 0.3:
                left[index] *= 1 - overlap if method == "linear" else 0
            if left[index] < 0.01:
                del left[index]
    dets, kept = soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=0.01, method=method, offset=offset)
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5)
    assert len(kept) == 0


@pytest.mark.parametrize(("method", "left"), [("naive", 0), ("linear", 0.4)])
def test_soft_nms_acts_at_the_threshold(method, left):
    from mmcv.ops import soft_nms

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]])  # they overlap by a half
    dets, _ = soft_nms(boxes, torch.tensor([0.9, 0.8]), 0.5, min_score=0.0, method=method)
    assert dets[1, 4].item() == pytest.approx(left)


def bilinear(plane, y, x):
    """The sample of a map (H W) at a real position, 0 one pixel and more outside; differentiable in the map."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(())
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = (1 - across) * plane[top, left] + across * plane[top, right]
    lower = (1 - across) * plane[bottom, left] + across * plane[bottom, right]
    return (1 - down) * upper + down * lower


def plain_roi_align(features, rois, size, scale, ratio, mode, aligned):
    shift = 0.5 if aligned else 0.0
    results = []
    for batch, *box in rois.tolist():
        x1, y1, x2, y2 = (value * scale - shift for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        rows, columns = ratio or math.ceil(bin_h), ratio or math.ceil(bin_w)
        for channel in features[int(batch)]:
            for row in range(size[0]):
                for column in range(size[1]):
                    samples = [
                        bilinear(
                            channel, y1 + (row + (i + 0.5) / rows) * bin_h, x1 + (column + (j + 0.5) / columns) * bin_w
                        )
                        for i in range(rows)
                        for j in range(columns)
                    ]
                    samples = torch.stack(samples) if samples else features.new_zeros(1)
                    results.append(samples.mean() if mode == "avg" else samples.max())
    return torch.stack(results).reshape(len(rois), features.shape[1], *size)


ROIS = [
    [0, 2.0, 3.0, 20.0, 17.0],
    [1, 0.0, 0.0, 31.0, 23.0],
    [1, -9.0, -9.0, 12.0, 50.0],
    [0, 28.0, 20.0, 44.0, 60.0],
    [0, 5.0, 5.0, 5.5, 5.5],
]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_and_its_gradient(mode, aligned, ratio):
    from mmcv.ops import roi_align

    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    result = roi_align(features, rois, (3, 2), 0.25, ratio, mode, aligned)
    expected = plain_roi_align(features, rois, (3, 2), 0.25, ratio, mode, aligned)
    torch.testing.assert_close(result, expected)
    weight = torch.randn_like(result)
    (gradient,) = torch.autograd.grad((result * weight).sum(), features)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), features)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_gradcheck(mode):
    from mmcv.ops import roi_align

    torch.manual_seed(0)
    features = torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 2), 0.25, 2, mode, True), features)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_without_rois_and_in_half_precision(mode):
    from mmcv.ops import RoIAlign

    layer = RoIAlign(7, 0.25, pool_mode=mode)
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    empty = layer(features, torch.zeros(0, 5))
    assert empty.shape == (0, 2, 7, 7)
    empty.sum().backward()
    assert not features.grad.any()
    rois = torch.tensor([[0, 1.0, 1, 20, 30]])
    expected = layer(features, rois)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(layer(features.to(dtype), rois.to(dtype)).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(gamma, weighted):
    from mmcv.ops import sigmoid_focal_loss

    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 4, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 0, 2])  # 4 is background
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    p = logits.sigmoid()
    expected = torch.zeros_like(p)
    for row in range(7):
        factor = weight[target[row]] if weighted and target[row] < 4 else 1
        for column in range(4):
            q = p[row, column]
            positive, negative = -0.25 * (1 - q) ** gamma * q.log(), -0.75 * q**gamma * (1 - q).log()
            expected[row, column] = factor * (positive if target[row] == column else negative)
    loss = sigmoid_focal_loss(logits, target, gamma, 0.25, weight, "none")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, target, gamma, 0.25, weight, "mean"), logits)


def test_sigmoid_focal_loss_is_finite_at_extremes():
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_softmax_focal_loss():
    from mmcv.ops import softmax_focal_loss

    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 1, 0])
    p = logits.softmax(1)[torch.arange(6), target]
    expected = (-0.25 * (1 - p) ** 2 * p.log()).mean()
    loss = softmax_focal_loss(logits, target, 2.0, 0.25, None, "mean")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_missing_operator_says_what_to_do():
    operator = importlib.import_module("mmcv._ext").operator_to_come
    with pytest.raises(BackendError, match=r"operator_to_come.*terrazzo doctor openmmlab.*compiled"):
        operator(torch.zeros(1), kernel_size=3)


def test_module_is_found_and_behaves_when_probed():
    spec = importlib.util.find_spec("mmcv._ext")
    assert spec is not None
    assert spec.name == "mmcv._ext"
    assert not hasattr(importlib.import_module("mmcv._ext"), "__path__")
    with pytest.raises(AttributeError):
        importlib.import_module("mmcv._ext").__wrapped__  # noqa: B018
    if sys.version_info < (3, 14):
        assert pkgutil.find_loader("mmcv._ext") is not None


def test_finder_stands_once_behind_the_file_system():
    from importlib.machinery import PathFinder

    from terrazzo.openmmlab import _ext, _finder

    _finder.install(_ext.MODULES)
    names = [type(finder).__name__ for finder in sys.meta_path]
    assert names.count("StandInFinder") == 1
    assert names.index("StandInFinder") > sys.meta_path.index(PathFinder)


@pytest.mark.long
def test_compiled_mmcv_takes_precedence(tmp_path):
    (tmp_path / "_ext.py").write_text("compiled = True")
    code = (
        "import sys, mmcv; mmcv.__path__.append(sys.argv[1])\n"
        "import terrazzo.openmmlab, mmcv._ext\n"
        "print(mmcv._ext.compiled)"
    )
    done = run_code(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.long
def test_fork_of_mmcv_keeps_its_own_operators(tmp_path):
    # A distribution of another name may provide the module `mmcv`, compiled operators and all.
    (tmp_path / "mmcv").mkdir()
    rest = str(Path(importlib.util.find_spec("mmcv").origin).parent)
    (tmp_path / "mmcv" / "__init__.py").write_text(f"__version__ = '2.9.0'; __path__.append({rest!r})")
    (tmp_path / "mmcv" / "_ext.py").write_text("nms = 'that of the fork'")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import terrazzo.openmmlab, mmcv._ext; print(mmcv._ext.nms)"
    done = run_code(code, tmp_path)
    assert done.stdout.strip() == "that of the fork", done.stderr


@pytest.mark.long
def test_bridge_imports_neither_mmdet_nor_mmseg():
    """Nor transformers, of which mmengine registers an optimizer: that is imported when it is built."""
    code = (
        "import sys, terrazzo.openmmlab; from mmengine.registry import OPTIMIZERS; assert 'Adafactor' in OPTIMIZERS\n"
        "print([m for m in ('mmdet', 'mmseg', 'transformers') if m in sys.modules])"
    )
    done = run_code(code)
    assert done.stdout.strip() == "[]", done.stderr

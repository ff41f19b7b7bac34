"""Overlaps of upright boxes, and suppression for every kind of box, compared with loops."""

import pytest
import torch

import terrazzo.openmmlab  # noqa: F401


def upright(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 40
    return torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 30 + 1], 1)


def rotated(count=60):
    boxes = upright(count)
    size = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([boxes[:, :2] + size / 2, size, torch.linspace(-4, 4, count)[:, None]], 1)


def plain_overlap(a, b, mode, offset):
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + offset, 0) for i in (0, 1))
    return width * height / (areas[0] if mode == "iof" else sum(areas) - width * height)


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps(mode, offset):
    from mmcv.ops import bbox_overlaps

    first, second = upright(9, 1), upright(9, 2)
    rows = [[plain_overlap(a, b, mode, offset) for b in second.tolist()] for a in first.tolist()]
    expected = torch.tensor(rows)
    torch.testing.assert_close(bbox_overlaps(first, second, mode, offset=offset), expected)
    torch.testing.assert_close(bbox_overlaps(first, second, mode, aligned=True, offset=offset), expected.diagonal())
    strided = bbox_overlaps(first.T.contiguous().T, second.T.contiguous().T, mode, offset=offset)
    torch.testing.assert_close(strided, expected)
    half = bbox_overlaps(first.half(), second.half(), mode, offset=offset)
    assert half.dtype == torch.float16
    exact = bbox_overlaps(first.half().float(), second.half().float(), mode, offset=offset)
    torch.testing.assert_close(half, exact.half(), rtol=0, atol=0)
    assert bbox_overlaps(first[:0], second).shape == (0, 9)


def greedy(overlaps, scores, suppresses):
    """The kept boxes by descending score, each with the boxes that it suppressed."""
    left = scores.argsort(descending=True).tolist()
    groups = []
    while left:
        best, *others = left
        groups.append([best, *(index for index in others if suppresses(overlaps[best, index]))])
        left = [index for index in others if not suppresses(overlaps[best, index])]
    return groups


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
def test_nms_match(threshold):
    from mmcv.ops import bbox_overlaps, nms_match

    boxes = upright()
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    expected = greedy(bbox_overlaps(boxes, boxes), scores, lambda overlap: overlap >= threshold)
    dets = torch.cat([boxes, scores[:, None]], 1)
    assert [group.tolist() for group in nms_match(dets, threshold)] == expected
    assert [group.tolist() for group in nms_match(dets.numpy(), threshold)] == expected
    assert nms_match(dets[:0], threshold) == []


def test_nms_match_takes_the_threshold_itself_and_keeps_ties_in_order():
    from mmcv.ops import nms_match

    half = torch.tensor([[0.0, 0, 4, 4, 0.5], [0, 0, 4, 2, 0.5], [9, 9, 10, 10, 0.5]])
    assert [group.tolist() for group in nms_match(half, 0.5)] == [[0, 1], [2]]
    assert len(nms_match(half, 0.51)) == 3


def quadrilaterals(boxes):
    """The corners of rotated boxes."""
    from terrazzo.openmmlab.ops._polygons import rotated_corners

    return rotated_corners(boxes).flatten(1).float()


@pytest.mark.parametrize("kind", ["rotated", "quadri"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_nms_of_rotated_boxes_and_quadrilaterals(kind, threshold):
    import mmcv.ops as ops

    boxes = rotated() if kind == "rotated" else quadrilaterals(rotated())
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    overlaps = getattr(ops, f"box_iou_{kind}")(boxes, boxes)
    expected = [group[0] for group in greedy(overlaps, scores, lambda overlap: overlap > threshold)]
    nms = getattr(ops, f"nms_{kind}")
    dets, kept = nms(boxes, scores, threshold)
    assert kept.tolist() == expected
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[expected])
    labels = torch.arange(len(boxes)) % 3
    assert nms(boxes, scores, threshold, labels.float())[1].tolist() == expected  # labels do not matter to mmcv
    strided = boxes.T.contiguous().T
    assert nms(strided, scores, threshold)[1].tolist() == expected
    assert len(nms(boxes.half(), scores.half(), threshold)[1])
    assert len(nms(boxes[:0], scores[:0], threshold)[0]) == 0


def test_nms_rotated_turns_the_other_way():
    from mmcv.ops import nms_rotated

    boxes = rotated()
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    mirrored = boxes * torch.tensor([1, 1, 1, 1, -1.0])
    expected = nms_rotated(boxes, scores, 0.2)[1].tolist()
    assert nms_rotated(mirrored, scores, 0.2, clockwise=False)[1].tolist() == expected
    assert nms_rotated(mirrored, scores, 0.2)[1].tolist() != expected


def test_batched_nms_keeps_classes_apart():
    from mmcv.ops import batched_nms, nms_rotated

    boxes = rotated()
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(len(boxes)) % 3
    _, kept = batched_nms(boxes, scores, labels, {"type": "nms_rotated", "iou_threshold": 0.2})
    expected = []
    for label in range(3):
        members = (labels == label).nonzero()[:, 0]
        expected += members[nms_rotated(boxes[members], scores[members], 0.2)[1]].tolist()
    assert sorted(kept.tolist()) == sorted(expected)


def test_long_chains_of_suppression():
    """Each box overlaps only the next, so every second box remains in a chain of any length."""
    from mmcv.ops import nms_rotated

    count = 201
    x = torch.arange(count) * 0.5
    boxes = torch.stack([x, 0 * x, 0 * x + 1, 0 * x + 1, 0 * x], 1)
    _, kept = nms_rotated(boxes, torch.linspace(1, 0.5, count), 0.2)
    assert kept.tolist() == list(range(0, count, 2))

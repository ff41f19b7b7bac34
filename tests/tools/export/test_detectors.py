"""Parts of exported detectors give the results of mmdet's and mmcv's code."""

import onnx
import pytest
import torch

from terrazzo.tools.export.detectors.boxes import decoded, divided, kept
from terrazzo.tools.export.detectors.masks import boxes_of, pasted
from terrazzo.tools.export.detectors.queries import MaskQueryReader
from terrazzo.tools.export.formats.onnx import export_onnx
from terrazzo.tools.export.tensorrt.operators import problems

SIZE = (40, 56)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def some_boxes(count, random):
    """Random boxes (count, 4) in an image of `SIZE`."""
    corners = torch.rand(count, 2, 2, generator=random).sort(dim=1).values
    return (corners * torch.tensor([SIZE[1], SIZE[0]])).flatten(1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DeltaXYWHBBoxCoder", {"target_means": (0.1, 0.0, 0.0, 0.2), "target_stds": (0.5, 0.5, 0.7, 0.7)}),
        ("DeltaXYWHBBoxCoder", {"clip_border": False}),
        ("DeltaXYWHBBoxCoder", {"add_ctr_clamp": True, "ctr_clamp": 3}),
        ("DistancePointBBoxCoder", {}),
        ("DistancePointBBoxCoder", {"clip_border": False}),
    ],
)
def test_decoded(kind, settings, random):
    from mmdet.models.task_modules import coders

    coder = getattr(coders, kind)(**settings)
    priors = some_boxes(50, random)[:, : 2 if "Point" in kind else 4]
    offsets = 5 * torch.randn(50, 4, generator=random)
    expected = coder.decode(priors, offsets, max_shape=SIZE)
    assert torch.equal(decoded(coder, priors, offsets, SIZE), expected)


@pytest.mark.parametrize("settings", [{}, {"class_agnostic": True}, {"split_thr": 10}])
def test_kept(settings, random):
    from mmcv.ops import batched_nms

    boxes, labels = some_boxes(200, random), torch.randint(0, 3, (200,), generator=random)
    scores = torch.rand(200, generator=random)
    if "split_thr" not in settings:  # with many ties; mmcv's order of ties is undefined if it runs by groups
        scores = scores.mul(20).round() / 20
    settings = {"type": "nms", "iou_threshold": 0.3, **settings}
    _, expected = batched_nms(boxes, scores, labels, settings)
    assert 10 < len(expected) < 190
    assert torch.equal(kept(boxes, scores, labels, settings), expected)


def test_nothing_is_kept_of_nothing():
    nothing = torch.zeros(0)
    assert kept(torch.zeros(0, 4), nothing, nothing.long(), {"iou_threshold": 0.5}).shape == (0,)


def test_pasted(random):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    boxes = some_boxes(30, random)
    boxes[0] = torch.tensor([5.0, 5.0, 5.0, 20.0])  # with a width of 0
    boxes[1] = torch.tensor([0.0, 0.0, SIZE[1], SIZE[0]])
    boxes[2] = torch.tensor([7.2, 7.2, 7.4, 7.3])
    masks = torch.rand(30, 14, 14, generator=random)
    found = pasted(masks, boxes, SIZE)
    for mask, box, mine in zip(masks, boxes, found, strict=True):  # each alone, as in mmdet on a CPU
        expected = torch.zeros(SIZE)
        part, place = _do_paste_mask(mask[None, None], box[None], *SIZE, skip_empty=True)
        expected[place] = part[0]
        assert torch.allclose(mine, expected, atol=1e-5)


def test_boxes_of(random):
    from mmdet.structures.mask import mask2bbox

    masks = torch.rand(20, *SIZE, generator=random) > 0.995
    masks[0] = False
    masks[1] = True
    assert torch.equal(boxes_of(masks), mask2bbox(masks))


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_segments(random, filtered, threshold):
    """Queries of things and stuff overlap; the highest threshold keeps no query."""
    from mmdet.models.seg_heads.panoptic_fusion_heads import MaskFormerFusionHead

    settings = {"object_mask_thr": threshold, "iou_thr": 0.2, "filter_low_score": filtered}
    fusion = MaskFormerFusionHead(num_things_classes=3, num_stuff_classes=2, test_cfg=settings)
    reader = MaskQueryReader.__new__(MaskQueryReader)
    torch.nn.Module.__init__(reader)
    reader.fusion = fusion
    logits = 2 * torch.randn(12, 6, generator=random)
    coarse = 4 * torch.randn(1, 12, 4, 5, generator=random) - 3
    masks = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[0]
    expected = fusion.panoptic_postprocess(logits, masks).sem_seg[0]
    assert len(expected.unique()) > 2 or threshold == 1.0
    assert torch.equal(reader._segments(logits, masks), expected)


@pytest.mark.long
def test_divided(tmp_path):
    """ONNX divides in float32, which cannot represent all whole numbers of this size."""

    class Net(torch.nn.Module):
        def forward(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return divided(numbers, 80)

    whole = torch.randint(2**20, (50_000,), generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([80 * whole, 80 * whole + 1, 80 * whole + 79, torch.arange(1000)])
    report = export_onnx(Net(), numbers, tmp_path / "net.onnx", label_limit=0)
    assert [parity.figure for parity in report.parities] == [0, 0]
    assert all((mine == theirs).all() for mine, theirs in zip(divided(numbers, 80), (numbers // 80, numbers % 80)))
    assert not problems(onnx.load(report.path))

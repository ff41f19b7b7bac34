"""The zoom of detectors: which boxes are kept, targets of tiles, and a real detector."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import terrazzo
from terrazzo.errors import InputError
from terrazzo.gated_zoom import Boxes, Grid
from terrazzo.gated_zoom._boxes import new_boxes, recovered, tiles_of, uncertainty, unite

GRID = Grid(80, 80, 40, 10)
"""Four tiles; crops of 60 x 60."""


def boxes(*found):
    """Boxes of x1, y1, x2, y2, score, label."""
    values = torch.tensor(found, dtype=torch.float32).reshape(-1, 6)
    return Boxes(values[:, :4], values[:, 4], values[:, 5].long())


def rows(found):
    return sorted([*box, round(score, 2), label] for box, score, label in zip(*(part.tolist() for part in found)))


def test_small_boxes_come_from_tiles_and_large_boxes_from_the_coarse_pass():
    small, large, elsewhere = (50, 5, 60, 15, 0.6, 0), (10, 10, 60, 60, 0.9, 0), (5, 60, 15, 70, 0.5, 1)
    found = unite(boxes(small, large, elsewhere), [boxes((31, 6, 41, 16, 0.7, 0))], GRID, [1])
    # The crop of tile 1 begins at x = 20: its box is nearly the small one, which it replaces.
    assert rows(found) == rows(boxes((51, 6, 61, 16, 0.7, 0), large, elsewhere))
    assert rows(unite(boxes(small), [], GRID, [])) == rows(boxes(small))


def test_boxes_that_the_crop_cuts():
    """They are dropped if a coarse box is the same thing; at the picture's edge nothing is cut."""
    coarse = boxes((12, 2, 44, 34, 0.9, 0))
    same, other, edge = (0, 2, 24, 34, 0.95, 0), (0, 40, 9, 49, 0.8, 0), (50, 2, 60, 34, 0.7, 0)
    found = unite(coarse, [boxes(same, other, edge)], GRID, [1])
    assert rows(found) == rows(boxes((12, 2, 44, 34, 0.9, 0), (20, 40, 29, 49, 0.8, 0), (70, 2, 80, 34, 0.7, 0)))
    other_class = unite(boxes((12, 2, 44, 34, 0.9, 1)), [boxes(same)], GRID, [1])
    assert len(other_class.scores) == 2


def test_things_in_two_crops_are_one():
    one, two = (30, 12, 42, 24, 0.8, 0), (10, 12, 22, 24, 0.7, 0)  # the same place in the crops of tiles 0 and 1
    assert rows(unite(boxes(), [boxes(one), boxes(two)], GRID, [0, 1])) == rows(boxes(one))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (None, 1),
        (dict(max_per_img=100), 1),
        (dict(nms=dict(type="nms", iou_threshold=0.7)), 2),
        (dict(rpn=dict(nms=dict(iou_threshold=0.5)), rcnn=dict(nms=dict(iou_threshold=0.7))), 2),
    ],
)
def test_nms_is_as_strict_as_the_detector_s(settings, count):
    """Two boxes with an IoU of .6: one object for an NMS at .5, two for one at .7."""
    one, two = (0, 0, 8, 10, 0.8, 0), (2, 0, 10, 10, 0.7, 0)
    model = Dots()
    model.test_cfg = settings
    zoom = terrazzo.zoom(model, scale=4, tile=40, halo=8, stride=8)
    (found,) = zoom.united([boxes()], [[boxes(one, two)]], GRID, [[0]])
    assert len(found.scores) == count


def test_targets_and_scores_of_tiles():
    coarse = boxes((5, 5, 15, 15, 0.9, 0), (50, 50, 60, 60, 0.5, 0), (0, 40, 39, 79, 0.5, 0))
    assert tiles_of(coarse.boxes, GRID).tolist() == [0, 3, 2]
    fine = [boxes((6, 5, 16, 15, 0.9, 0)), boxes((40, 5, 50, 15, 0.9, 0), (2, 5, 12, 15, 0.9, 0)), boxes(), boxes()]
    fine[2] = boxes((5, 50, 15, 58, 0.1, 0))  # too weak
    fine[3] = boxes((30, 30, 40, 40, 0.9, 1), (35, 10, 45, 20, 0.9, 0))  # another class, and another new box
    assert new_boxes(coarse, fine, GRID).tolist() == [[0, 1], [0, 1]]
    assert uncertainty(coarse, GRID).tolist() == [[pytest.approx(0.36), 0], [0, 1]]  # the large box does not count


def test_what_a_fine_pass_recovers():
    """Only missed boxes that the fine pass of their own tile finds, with their class."""
    truth = boxes((5, 5, 15, 15, 1, 0), (50, 5, 60, 15, 1, 0), (70, 5, 78, 15, 1, 0), (50, 50, 60, 60, 1, 1))
    coarse = boxes((5, 5, 15, 15, 0.9, 0), (50, 5, 60, 15, 0.1, 0), (50, 50, 60, 60, 0.9, 0))  # weak; another class
    nothing, at = boxes(), (30, 5, 40, 15, 0.9, 0)  # the crop of tile 1 begins at x = 20
    assert recovered(coarse, [boxes((5, 5, 15, 15, 0.9, 0)), boxes(at), nothing, nothing], truth, GRID).tolist() == [
        [0, 1],
        [0, 0],
    ]
    both = boxes(at, (50, 5, 58, 15, 0.9, 0))
    ours, others = boxes((30, 30, 40, 40, 0.9, 1)), boxes((30, 30, 40, 40, 0.9, 0))
    assert recovered(coarse, [both, both, nothing, ours], truth, GRID).tolist() == [[0, 2], [0, 1]]
    assert recovered(coarse, [nothing, nothing, boxes(at), others], truth, GRID).sum() == 0
    assert recovered(boxes(), [boxes()] * 4, boxes(), GRID).sum() == 0


class Dots(nn.Module):
    """Stands for a detector: a box of 2 x 2 around each pixel above .5, surer the brighter it is."""

    with_mask = False

    def __init__(self):
        super().__init__()
        self.backbone, self.bbox_head = nn.Conv2d(3, 4, 8, stride=8), nn.Identity()

    def predict(self, images, samples, rescale=True):
        self.backbone(images)
        for image, sample in zip(images, samples):
            assert tuple(image.shape[1:]) == sample.metainfo["img_shape"]
            y, x = (image[0] > 0.5).nonzero().T.float()
            bright = image[0][image[0] > 0.5]
            around = torch.stack([x - 0.5, y - 0.5, x + 1.5, y + 1.5], 1)
            sample.pred_instances = SimpleNamespace(bboxes=around, scores=bright, labels=torch.zeros_like(x).long())
        return samples


def test_a_fine_pass_finds_what_the_coarse_pass_misses():
    image = torch.zeros(2, 3, 80, 80)
    image[0, :, 20, 60] = image[0, :, 60, 20] = image[1, :, 70, 70] = 1.0  # single pixels vanish at 1/4
    model = Dots()
    zoom = terrazzo.zoom(model, scale=4, tile=40, halo=8, budget=1, stride=8, batch=3)
    assert zoom.score == "uncertainty"
    full = model.predict(image, [SimpleNamespace(metainfo=dict(img_shape=(80, 80))) for _ in image])
    look = zoom.look(image)
    assert [len(found.scores) for found in look.coarse.result] == [0, 0]
    for found, wanted in zip(look.result, full):
        assert rows(found) == rows(Boxes(*vars(wanted.pred_instances).values()))
    assert look.megapixels == [pytest.approx((20**2 + 4 * 56**2) / 1e6)] * 2
    image[0, :, 16:32, 52:68] = 0.8
    assert terrazzo.zoom(model, scale=4, tile=40, halo=8, budget=0.25, stride=8).look(image).tiles[0] == [1]


def test_gains_by_an_annotation_in_the_picture_s_own_size():
    pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
    from terrazzo.tools.zoom.gains import gains

    image = torch.zeros(1, 3, 80, 80)
    image[0, :, 20, 60] = 1.0
    zoom = terrazzo.zoom(Dots(), scale=4, tile=40, halo=8, stride=8)
    grid = zoom.grid(image)
    fine = zoom.fine(image, grid, [range(4)])
    own = torch.tensor([[29.75, 9.75, 30.75, 10.75]])  # half the size of the input
    truth = SimpleNamespace(bboxes=own, labels=torch.tensor([0]))

    class Sample(SimpleNamespace):
        def __contains__(self, name):
            return hasattr(self, name)

    sample = Sample(gt_instances=truth, metainfo=dict(scale_factor=(2.0, 2.0)))
    found = gains(zoom, image, [sample], grid, zoom.coarse(image).result, fine)
    assert found.tolist() == [[[0, 1], [0, 0]]]
    with pytest.raises(InputError, match="has no boxes"):
        gains(zoom, image, [Sample()], grid, zoom.coarse(image).result, fine)


def test_coarse_boxes_are_in_the_picture():
    image = torch.zeros(1, 3, 78, 82)
    image[0, :, 32:48, 52:68] = 1.0
    look = terrazzo.zoom(Dots(), scale=4, tile=40, halo=8, budget=0, stride=8).look(image)
    centre = (look.result[0].boxes[:, :2] + look.result[0].boxes[:, 2:]) / 2
    assert len(centre) > 8
    assert (centre.mean(0) - torch.tensor([60.0, 40.0])).abs().max() < 2  # half a pixel of the reduced image


def test_masks_are_refused():
    model = Dots()
    model.with_mask = True
    with pytest.raises(InputError, match="gives masks"):
        terrazzo.zoom(model)


def test_a_refinement_is_refused():
    with pytest.raises(InputError, match="corrects the logits of segmentors, and a Dots gives boxes"):
        terrazzo.zoom(Dots(), refine=True)


@pytest.mark.long
def test_a_detector_of_mmdetection(tmp_path):
    """A RetinaNet with random weights: installed, it predicts in the pictures' own size, and its heads are trained."""
    pytest.importorskip("mmdet", reason="needs the extra 'openmmlab'")
    import terrazzo.openmmlab  # isort: skip  before mmdet
    from mmdet.structures import DetDataSample
    from mmengine.registry import MODELS

    from terrazzo.openmmlab.config import load_config

    options = {"model.backbone.name": "resnet10t", "model.backbone.out_indices": (2, 3, 4)}
    cfg = load_config("retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480", options=options)
    torch.manual_seed(0)
    cfg.model.test_cfg.score_thr = 0.0
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "base.pth")
    meta = dict(img_shape=(96, 128), ori_shape=(48, 64), scale_factor=(2.0, 2.0))
    batch = dict(
        inputs=[torch.randint(256, (3, 96, 128), dtype=torch.uint8)], data_samples=[DetDataSample(metainfo=meta)]
    )
    zoom = terrazzo.zoom(model, scale=2, tile=32, halo=32, budget=0.5)
    looks = []
    zoom.on_look = looks.append
    zoom.install()
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    found = sample.pred_instances
    assert len(looks) == 1
    assert len(found.bboxes) == len(looks[0].result[0].scores) > 0
    assert found.bboxes[:, 0::2].max() <= 64
    assert found.bboxes[:, 1::2].max() <= 48
    settings = dict(type="ZoomHeads", base=cfg.model, checkpoint=str(tmp_path / "base.pth"), scale=2, tile=32)
    heads = MODELS.build(settings)
    data = heads.data_preprocessor(batch, True)
    assert torch.isfinite(heads(**data, mode="loss")["loss_region"])
    (judged,) = heads(**data, mode="predict")
    assert {key: value.shape for key, value in judged.items() if key != "tiles"} == dict.fromkeys(
        ("scores", "untrained", "targets"), (12,)
    )
    with pytest.raises(InputError, match="is for segmentors"):
        MODELS.build({**settings, "stage": "gate"})

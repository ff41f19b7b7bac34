"""torchvision's detectors on `terrazzo.torchvision_backbone`."""

import pytest
import torch
from support.ecosystem import reloads, step
from support.seeded import image

import terrazzo

detection = pytest.importorskip("torchvision.models.detection", reason="needs torchvision")
pytestmark = pytest.mark.slow

OCTAVES = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))


def rcnn(kind: str, name: str):
    backbone = terrazzo.torchvision_backbone(name, drop_path_rate=0.1)
    return getattr(detection, kind)(backbone, num_classes=3, min_size=96, max_size=128)


def single_stage(kind: str, name: str):
    backbone = terrazzo.torchvision_backbone(name, extra="p6p7", out_indices=(1, 2, 3), out_channels=64)
    return getattr(detection, kind)(backbone, num_classes=3, min_size=96, max_size=128)


def targets():
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 10:50, 20:70], masks[1, 40:85, 60:110] = 1, 1
    boxes = torch.tensor([[20.0, 10, 70, 50], [60, 40, 110, 85]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}]


@pytest.mark.parametrize(
    ("make", "kind", "name"),
    [
        (rcnn, "MaskRCNN", "s2aformer_mini"),
        (rcnn, "FasterRCNN", "attnet_xxs"),
        (single_stage, "RetinaNet", "dinat_mini"),
        (single_stage, "FCOS", "vmamba_tiny_s1l8"),
    ],
)
def test_steps_and_reloads(make, kind, name, tmp_path):
    torch.manual_seed(0)
    model, images = make(kind, name), [image((90, 120))[0].sigmoid()]
    losses = model(images, targets())
    step(sum(losses.values()), model.backbone.body)
    model.eval()
    reloads(model, lambda: make(kind, name), lambda model: model.backbone(images[0][None]), tmp_path / "model.pth")
    (found,) = model(images)
    assert set(found) >= {"boxes", "scores", "labels"}


@pytest.mark.parametrize(
    ("kind", "extra", "indices", "scales"),
    [("FasterRCNN", "pool", None, (8,)), ("RetinaNet", "p6p7", (1, 2, 3), OCTAVES)],
)
def test_own_anchors_are_torchvisions_where_it_has_defaults(kind, extra, indices, scales):
    backbone = terrazzo.torchvision_backbone("s2aformer_mini", extra=extra, out_indices=indices)
    model = getattr(detection, kind)(backbone, num_classes=2)
    theirs = (model.rpn if kind == "FasterRCNN" else model).anchor_generator
    assert backbone.anchors(scales).sizes == theirs.sizes
    assert backbone.anchors(scales).aspect_ratios == theirs.aspect_ratios


def test_anchors_fit_fewer_maps():
    backbone = terrazzo.torchvision_backbone("s2aformer_mini", out_indices=(1, 2))
    assert (backbone.names, backbone.strides) == (["0", "1", "pool"], [8, 16, 32])
    model = detection.FasterRCNN(
        backbone, num_classes=2, rpn_anchor_generator=backbone.anchors(), min_size=64, max_size=64
    )
    model([image((64, 64))[0].sigmoid()], [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}])


def test_maps_have_the_stated_strides_and_channels():
    backbone = terrazzo.torchvision_backbone("resnet18", out_channels=32, out_indices=(1, 2, 3, 4)).eval()
    maps = backbone(image((97, 130)))
    assert list(maps) == backbone.names == ["0", "1", "2", "3", "pool"]
    for stride, x in zip(backbone.strides, maps.values()):
        assert x.shape == (1, 32, -(-97 // stride), -(-130 // stride))


def test_a_plain_model_with_a_simple_pyramid():
    backbone = terrazzo.torchvision_backbone("roma_tiny", pyramid=True, out_channels=32).eval()
    assert backbone.strides == [4, 8, 16, 32, 64]
    maps = backbone(image((64, 96)))
    assert [tuple(y.shape[2:]) for y in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("dinat_mimi", {}, "did you mean dinat_mini"),
        ("roma_tiny", {}, "each must be twice the stride before"),
        ("s2aformer_mini", {"extra": "p8"}, "extra must be 'pool', 'p6p7' or None, got 'p8'"),
    ],
)
def test_refusals(name, options, part):
    with pytest.raises(terrazzo.TerrazzoError, match=part):
        terrazzo.torchvision_backbone(name, **options)

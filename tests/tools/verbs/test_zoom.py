"""`terrazzo test --zoom`, `terrazzo infer --zoom` and `terrazzo zoom oracle`, run as by a user."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_data

from terrazzo.gated_zoom import Boxes, Heads
from terrazzo.tools import results
from terrazzo.tools.zoom.oracle import OracleRow
from terrazzo.tools.zoom.sweep import Point

SIZES = ("--zoom-tile", 32, "--zoom-halo", 16, "--zoom-stride", 16)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of trained heads for the segmentor of `trained`, whose gate spares every picture."""
    torch.manual_seed(0)
    made = Heads(128, scale=2, tile=32, classes=6)
    torch.nn.init.normal_(made.refine.mix.bias, std=10)
    made.trained[:] = True
    made.thresholds[:] = torch.tensor([0.5, 1.0])
    path = tmp_path_factory.mktemp("heads") / "heads.pth"
    torch.save({"state_dict": {f"heads.{name}": value for name, value in made.state_dict().items()}}, path)
    return path


def metrics(run, trained, floors, out, *options):
    done = run("test", *trained, "--data-root", floors, "--out", out, *options)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.stdout


@pytest.mark.long
def test_test(run, trained, floors, heads, tmp_path):
    plain, _ = metrics(run, trained, floors, tmp_path / "plain.json")
    found, said = metrics(run, trained, floors, tmp_path / "zoom.json", "--zoom", 2, "--budget", 0.5, *SIZES)
    # Pictures of 64 x 64: 32 x 32 coarse, and 2 of 4 crops of 64 x 64, which the picture bounds.
    assert found["megapixels per picture"] == pytest.approx((32**2 + 2 * 64**2) / 1e6)
    assert found["share of a full pass (%)"] == pytest.approx(225)
    assert found["gated off (%)"] == 0
    assert found["ms per picture"] > 0
    assert found.keys() - plain.keys() == {key for key in found if "picture" in key or "(%)" in key}
    assert "megapixels per picture" in said
    every, _ = metrics(run, trained, floors, tmp_path / "all.json", "--zoom", 2, "--budget", 1, *SIZES)
    assert every["mIoU"] == pytest.approx(plain["mIoU"], abs=0.01)  # each crop is the whole picture
    options = ("--zoom", 2, "--zoom-heads", heads, "--zoom-halo", 16, "--zoom-stride", 16)
    spared, _ = metrics(run, trained, floors, tmp_path / "spared.json", *options)
    assert spared["gated off (%)"] == 100
    assert spared["megapixels per picture"] == pytest.approx(32**2 / 1e6)
    refined, _ = metrics(run, trained, floors, tmp_path / "refined.json", *options, "--zoom-gate", 0, "--zoom-refine")
    assert refined["gated off (%)"] == 0
    assert refined["mIoU"] != plain["mIoU"]  # this refinement adds random numbers


@pytest.mark.long
def test_sweep(run, trained, floors, heads, tmp_path):
    plain, _ = metrics(run, trained, floors, tmp_path / "plain.json")
    options = ("--zoom", 2, "--zoom-heads", heads, "--zoom-gate", 0, *SIZES)
    by_head, _ = metrics(run, trained, floors, tmp_path / "region.json", "--budget", 0.5, *options)
    options += ("--zoom-score", "entropy", "--sweep", tmp_path / "curve.png")  # a sweep has all scores anyway
    done = run("test", *trained, "--data-root", floors, *options)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
    points = results.read(tmp_path / "curve.csv", Point)
    found = {(point.score, point.budget): point for point in points}
    assert {point.score for point in points} == {"full pass", "region", "entropy", "random", "oracle"}
    assert {point.metric for point in points} == {"mIoU"}
    assert found["full pass", 1].value == pytest.approx(plain["mIoU"], abs=0.01)
    for score in ("region", "entropy", "random", "oracle"):  # a point is what an evaluation at its budget gives
        assert found[score, 0].value == found["entropy", 0].value
        assert found[score, 1].value == pytest.approx(plain["mIoU"], abs=0.01)
    arguments = ("--zoom", 2, "--budget", 0.5, "--zoom-score", "entropy", *SIZES)
    alone, _ = metrics(run, trained, floors, tmp_path / "alone.json", *arguments)
    assert found["entropy", 0.5].value == pytest.approx(alone["mIoU"], abs=0.01)
    assert found["region", 0.5].value == pytest.approx(by_head["mIoU"], abs=0.01)
    assert found["entropy", 0.5].megapixels == pytest.approx(alone["megapixels per picture"])


BOXES = """_base_ = {base!r}
custom_imports = dict(imports=["terrazzo.openmmlab"])
model = dict(backbone=dict(name="resnet10t", out_indices=(2, 3, 4)))
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
"""


def bright_boxes(self, images):
    """Stands for a detector: bright areas of at least 100 pixels, once for each of three classes."""
    from mmengine.structures import InstanceData

    self.container, found = InstanceData, []
    for image in images:
        parts = cv2.connectedComponentsWithStats((image.mean(0) > 0).byte().numpy())[2][1:]
        x, y, width, height, area = torch.from_numpy(parts).float().repeat(3, 1).T
        places = torch.stack([x, y, x + width, y + height], 1)
        labels = torch.arange(3).repeat_interleave(len(parts))
        found.append(Boxes(places, torch.full_like(x, 0.9), labels).at(area >= 100))
    return found


@pytest.mark.long
def test_sweep_of_a_detector(run, tmp_path, monkeypatch):
    """Objects that the coarse pass misses: points are what evaluations at their budgets give, COCO's mAP of boxes."""
    from mmengine.registry import MODELS

    from terrazzo.gated_zoom._detector import DetectorPasses
    from terrazzo.openmmlab.config import load_config, packaged_configs

    monkeypatch.setattr(DetectorPasses, "forward", bright_boxes)
    root, config, weights = tmp_path / "bccd", tmp_path / "boxes.py", tmp_path / "boxes.pth"
    tiny_data.write_detection(root, ("RBC", "WBC", "Platelets"), (96, 64), masks=False)
    pixels = np.zeros((64, 96, 3), np.uint8)
    for x, y, width, height in tiny_data.objects():
        pixels[y : y + height, x : x + width] = 255
    for path in (root / "images" / "test").iterdir():
        Image.fromarray(pixels).save(path)
    base = packaged_configs()["retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"]
    config.write_text(BOXES.format(base=str(base)))
    torch.save({"state_dict": MODELS.build(load_config(config).model).state_dict(), "meta": {}}, weights)
    options = ("--zoom", 2, "--zoom-tile", 32, "--zoom-halo", 16, "--zoom-stride", 16)
    alone, _ = metrics(run, (config, weights), root, tmp_path / "alone.json", *options, "--budget", 0.5)
    done = run("test", config, weights, "--data-root", root, *options, "--sweep", tmp_path / "curve.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "curve.png").stat().st_size > 1000
    found = {(point.score, point.budget): point for point in results.read(tmp_path / "curve.csv", Point)}
    assert {score for score, _ in found} == {"full pass", "uncertainty", "random", "oracle"}
    assert {point.metric for point in found.values()} == {"coco/bbox_mAP"}
    assert found["uncertainty", 0.5].value == pytest.approx(alone["coco/bbox_mAP"], abs=1e-3)
    assert found["uncertainty", 0.5].megapixels == pytest.approx(alone["megapixels per picture"])
    for score in ("uncertainty", "random", "oracle"):
        assert found[score, 0].value == 0  # nothing is found at half of the size: the metric is missing, or 0
        assert found[score, 1].value == found["oracle", 1].value > 0.1
    assert found["full pass", 1].value > 0.1
    assert found["oracle", 0.2].value > 0.1  # one tile, of those with objects


@pytest.mark.long
def test_infer(run, trained, picture, tmp_path):
    config, checkpoint = trained
    places = []
    for name, options in (("plain", ()), ("zoom", ("--zoom", 2, "--budget", 0.5, *SIZES))):
        done = run("infer", config, picture, "--checkpoint", checkpoint, "--out", tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        places.append(np.asarray(Image.open(tmp_path / name / "floor.labels.png")))
    assert places[0].shape == places[1].shape == (67, 91)
    assert (places[0] != places[1]).any()


@pytest.mark.long
def test_refusals(refused, trained, floors, detector, picture):
    config, checkpoint = trained
    test = ("test", config, checkpoint, "--data-root", floors)
    assert "--budget is for a zoom" in refused(*test, "--budget", 0.5)
    assert "--sweep is for a zoom" in refused(*test, "--sweep", "x.png")
    sweep = (*test, "--zoom", 2, "--sweep")
    assert "--sweep writes its own table: leave --out out" in refused(*sweep, "x.png", "--out", "x.json")
    assert "its file must end with .png, got x.csv" in refused(*sweep, "x.csv")
    assert "must be a multiple" in refused(*test, "--zoom", 2, "--zoom-tile", 40)
    assert "needs a trained region head" in refused(*test, "--zoom", 2, "--zoom-score", "region")
    assert "refine=True needs a trained refinement" in refused(*test, "--zoom", 2, "--zoom-refine")
    assert "--zoom-refine is for a zoom" in refused(*test, "--zoom-refine")
    infer = ("infer", detector[0], picture, "--checkpoint", detector[1], "--zoom", 2)
    assert "gives masks" in refused(*infer)
    assert "--zoom is for segmentors and detectors" in refused("infer", "resnet10t", picture, "--zoom", 2)


@pytest.mark.long
def test_oracle_without_labels(refused, tmp_path):
    tiny_data.write_detection(tmp_path, ("RBC", "WBC", "Platelets"), (96, 64), masks=False)
    boxes = "retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480"
    options = ("--data-root", tmp_path, "--tile", 16)
    assert "the data has boxes without masks" in refused("zoom", "oracle", boxes, *options)


@pytest.mark.long
def test_oracle(run, floors, tmp_path):
    """More tiles and finer labels are better, and the worst tiles have more than their share of the errors."""
    done = run(
        *("zoom", "oracle", "fpn_dinat-mini_floors", "--data-root", floors, "--split", "val", "--tile", 16),
        *("--factor", 4, "--factor", 8, "--out", tmp_path / "oracle.csv"),
    )
    assert done.exit_code == 0, done.output
    rows = results.read(tmp_path / "oracle.csv", OracleRow)
    values = {(row.metric, row.factor, row.share): row.value for row in rows}
    for factor in (4, 8):
        curve = [values["mIoU", factor, share] for share in (0, 0.1, 0.2, 0.3, 0.5)]
        assert curve == sorted(curve)
        assert values["wrong pixels in the tiles", factor, 0.5] > 50
    assert values["mIoU", 4, 0] > values["mIoU", 8, 0]
    assert f"{values['mIoU', 4, 0.3]:.1f}" in done.stdout

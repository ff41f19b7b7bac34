"""`terrazzo infer`: classifiers, segmentors and detectors, on valid and invalid pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import terrazzo
from terrazzo.errors import InputError
from terrazzo.tools.data import rle

MASK2FORMER = """
_base_ = ["{base}"]
model = dict(
    backbone=dict(_delete_=True, type="TerrazzoBackbone", name="resnet10t", out_indices=(1, 2, 3, 4)),
    panoptic_head=dict(
        in_channels=[64, 128, 256, 512],
        num_queries=20,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=1),
    ),
    test_cfg=dict(max_per_image=5, object_mask_thr=0.0, iou_thr=0.0),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="{loading}"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""


def test_classifier(run, picture, tmp_path):
    out = tmp_path / "out"
    result = run("infer", "resnet10t", picture, "--out", out)
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stderr
    record = json.loads((out / "floor.json").read_text())
    assert (record["width"], record["height"]) == (91, 67)
    scores = [entry["score"] for entry in record["top"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert all(isinstance(entry["label"], str) for entry in record["top"])
    drawing = Image.open(out / "floor.overlay.jpg")
    assert drawing.width == 91
    assert drawing.height > 67
    assert sorted(path.name for path in out.iterdir()) == ["floor.json", "floor.overlay.jpg"]


@pytest.mark.long
def test_classifier_of_a_config(run, picture, tmp_path):
    from mmengine.registry import MODELS

    from terrazzo.openmmlab.config import load_config, packaged_configs

    base = packaged_configs()["dinat-mini_1xb64-30e_eurosat64"]
    config = tmp_path / "classifier.py"
    config.write_text(f'_base_ = ["{base}"]\nmodel = dict(backbone=dict(name="resnet10t", drop_path_rate=0.0))\n')
    model = MODELS.build(load_config(config).model)
    checkpoint = tmp_path / "classifier.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    result = run("infer", config, picture, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    top = json.loads((tmp_path / "out" / "floor.json").read_text())["top"]
    assert {entry["label"] for entry in top} <= set(load_config(config).metainfo.classes)
    exported = run("export", config, checkpoint, "--out", tmp_path / "model.onnx")
    assert exported.exit_code == 0, exported.output
    assert "1x3x64x64" in exported.stdout


def test_segmentor_on_a_folder(run, trained, floors, picture, tmp_path):
    config, checkpoint = trained
    places = (floors / "images" / "val", picture)
    result = run("infer", config, *places, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == 3 * 4
    record = json.loads((tmp_path / "out" / "floor.json").read_text())
    labels = np.asarray(Image.open(tmp_path / "out" / "floor.labels.png"))
    assert labels.shape == (67, 91)
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-4)
    for name, share in record["shares"].items():
        assert (labels == record["classes"].index(name)).mean() == pytest.approx(share, abs=1e-5)


@pytest.mark.long
def test_detector(run, detector, picture, tmp_path):
    config, checkpoint = detector
    out = tmp_path / "out"
    result = run("infer", config, picture, "--checkpoint", checkpoint, "--out", out, "--min-score", 0)
    assert result.exit_code == 0, result.output
    things = json.loads((out / "floor.json").read_text())["things"]
    assert 1 <= len(things) <= 5
    for thing in things:
        assert thing["label"] == "chip"
        left, top, right, bottom = thing["box"]
        assert 0 <= left <= right <= 91
        assert 0 <= top <= bottom <= 67
        assert rle.decode(thing["mask"]).shape == (67, 91)
    assert Image.open(out / "floor.overlay.jpg").size == (91, 67)
    strict = run("infer", config, picture, "--checkpoint", checkpoint, "--out", out, "--min-score", 1)
    assert "nothing found" in strict.stdout


def mask2former(folder, base, loading):
    """A config of a small Mask2Former of mmdet, and a checkpoint with random weights."""
    from mmengine.registry import MODELS

    from terrazzo.openmmlab.config import load_config, packaged_configs

    config, checkpoint = folder / "mask2former.py", folder / "mask2former.pth"
    config.write_text(MASK2FORMER.format(base=packaged_configs()[base], loading=loading))
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(load_config(config).model).state_dict()}, checkpoint)
    return config, checkpoint


@pytest.mark.long
def test_mask2former_of_instances(run, picture, tmp_path):
    base = "mask2former_dinat-large_16xb1-lsj-100e_coco"
    config, checkpoint = mask2former(tmp_path, base, "LoadAnnotations")
    out = tmp_path / "out"
    result = run("infer", config, picture, "--checkpoint", checkpoint, "--out", out, "--min-score", 0)
    assert result.exit_code == 0, result.output
    things = json.loads((out / "floor.json").read_text())["things"]
    assert len(things) == 5
    scores = [thing["score"] for thing in things]
    assert scores == sorted(scores, reverse=True)
    for thing in things:
        mask = rle.decode(thing["mask"])
        assert mask.shape == (67, 91)
        left, top, right, bottom = thing["box"]
        assert mask.sum() <= (right - left) * (bottom - top)
    assert Image.open(out / "floor.overlay.jpg").size == (91, 67)


@pytest.mark.long
def test_mask2former_of_panoptic_segments(run, refused, picture, tmp_path):
    base = "mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic"
    config, checkpoint = mask2former(tmp_path, base, "LoadPanopticAnnotations")
    out = tmp_path / "out"
    result = run("infer", config, picture, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "floor.json").read_text())
    numbers = np.asarray(Image.open(out / "floor.segments.png"))
    assert numbers.shape == (67, 91)
    assert len(record["classes"]) == 133
    assert record["classes"][0] == "person"  # the checkpoint has no class names, so the data set's names apply
    assert record["segments"]
    assert [segment["id"] for segment in record["segments"]] == list(range(1, numbers.max() + 1))
    for segment in record["segments"]:
        assert (numbers == segment["id"]).mean() == pytest.approx(segment["share"], abs=1e-5)
        assert segment["label"] == record["classes"][segment["index"]]
        assert segment["thing"] == (segment["index"] < 80)
    stuff = [segment["index"] for segment in record["segments"] if not segment["thing"]]
    assert len(stuff) == len(set(stuff))
    drawing = Image.open(out / "floor.overlay.jpg")
    assert drawing.width == 91
    assert drawing.height > 67
    assert sorted(path.suffix for path in out.iterdir()) == [".jpg", ".json", ".png"]
    words = refused("export", config, checkpoint, "--out", tmp_path / "model.onnx")
    assert "give it with --size H W" in words


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("dinat-mini_1xb64-30e_eurosat64", "classification"),
        ("mask2former_dinat-large_8xb2-160k_ade20k-640x640", "segmentation"),
        ("mask2former_dinat-large_16xb1-90k_cityscapes-instance", "detection"),
        ("mask2former_dinat-large_16xb1-lsj-100e_coco", "detection"),
        ("mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic", "panoptic"),
        ("dino-4scale_dinat-tiny_8xb2-12e_coco", "detection"),
    ],
)
def test_tasks_of_configs(name, task):
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools import mm

    assert mm.task_of(load_config(name)) == task


def test_kinds_of_pictures(run, picture, tmp_path):
    """Grey, transparent, 16-bit, CMYK and sideways pictures are read; results of equal names are not overwritten."""
    folder, other = tmp_path / "kinds", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    image = Image.open(picture)
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "clear.png")
    image.convert("CMYK").save(folder / "ink.jpg")
    Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)).save(folder / "deep.png")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "sideways.jpg", exif=exif)
    image.save(folder / "twin.png")
    image.save(folder / "twin.jpg")
    shutil.copy(folder / "twin.jpg", other / "twin.jpg")
    result = run("infer", "resnet10t", folder, other, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*.json"))) == 8
    sideways = json.loads((tmp_path / "out" / "sideways.json").read_text())
    assert (sideways["width"], sideways["height"]) == (67, 91)


def test_bad_picture_stops_everything(refused, picture, bad_picture, tmp_path):
    assert str(bad_picture) in refused("infer", "resnet10t", picture, bad_picture, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_of_too_many_pixels_need_an_option(run, refused, picture, tmp_path, monkeypatch):
    command = ("infer", "resnet10t", picture, "--out", tmp_path / "out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    said = refused(*command)
    assert f"picture {picture} has 91x67 pixels, more than the limit of 0.005 megapixels" in said
    assert "--max-megapixels 1 of `terrazzo infer`" in said
    assert "--max-megapixels" in refused(*command, "--max-megapixels", "0")
    assert not (tmp_path / "out").exists()
    assert run(*command, "--max-megapixels", "1").exit_code == 0
    assert Image.MAX_IMAGE_PIXELS == 5000  # as before the command
    with pytest.raises(InputError, match="more than the limit"):
        terrazzo.Predictor("resnet10t", device="cpu")(picture)


def test_refusals(refused, trained, picture, tmp_path):
    config, checkpoint = trained
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("in the way")
    out = ("--out", tmp_path / "out")
    assert "did you mean resnet10t" in refused("infer", "resnet10", picture, *out)
    assert "no pictures" in refused("infer", "resnet10t", tmp_path / "nothing", *out)
    assert "--checkpoint FILE" in refused("infer", config, picture, *out)
    assert "does not exist" in refused("infer", config, picture, "--checkpoint", tmp_path / "none.pth", *out)
    assert "is refused" in refused("infer", config, picture, "--checkpoint", tmp_path / "file", *out)
    assert "is a file" in refused("infer", "resnet10t", picture, "--out", tmp_path / "file")
    assert "is a file" in refused("infer", "resnet10t", picture, "--out", tmp_path / "file" / "below")
    assert "warp" in refused("infer", "resnet10t", picture, "--device", "warp", *out)
    assert "give one of them" in refused(
        "infer", "resnet10t", picture, "--pretrained", "--checkpoint", checkpoint, *out
    )
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "in the way"


def test_checkpoint_of_another_model(refused, trained, detector, picture, tmp_path):
    config, _ = trained
    _, foreign = detector
    assert "does not fit this config" in refused(
        "infer", config, picture, "--checkpoint", foreign, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def tiff_of(picture, tmp_path):
    """The picture as a TIFF, which is read by windows."""
    path = tmp_path / "windows.tif"
    Image.open(picture).save(path)
    return path


@pytest.mark.long
def test_segmentor_on_tiles(run, trained, picture, tmp_path):
    config, checkpoint = trained
    out = tmp_path / "out"
    call = ("infer", config, picture, "--checkpoint", checkpoint, "--out", out)
    result = run(*call, "--tile", 64, "--overlap", "blend", "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "where tiles overlap, " in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["floor.json", "floor.labels.png", "floor.overlay.jpg"]
    facts = json.loads((out / "floor.json").read_text())["tiles"]
    assert (facts["how"], facts["count"]) == ("blend", 4)
    labels = np.asarray(Image.open(out / "floor.labels.png"))
    assert labels.shape == (67, 91)
    predictor = terrazzo.Predictor(config, checkpoint, device="cpu", tile=64, overlap="blend")
    for item in (picture, np.asarray(Image.open(picture))):
        assert np.array_equal(predictor(item, batch=2).labels, labels)


def test_segmentor_on_tiles_of_a_picture_read_by_windows(run, trained, picture, tmp_path):
    pytest.importorskip("rasterio", reason="needs the extra 'huge'")
    config, checkpoint = trained
    out = tmp_path / "out"
    call = ("infer", config, picture, tiff_of(picture, tmp_path), "--checkpoint", checkpoint, "--out", out)
    result = run(*call, "--tile", 64, "--overlap", "blend", "--batch", 2)
    assert result.exit_code == 0, result.output
    names = ("floor.json floor.labels.png floor.overlay.jpg", "windows.json windows.labels.tif windows.overlay.tif")
    assert sorted(path.name for path in out.iterdir()) == " ".join(names).split()
    records = [json.loads((out / f"{name}.json").read_text()) for name in ("floor", "windows")]
    assert records[0] | {"picture": None} == records[1] | {"picture": None}
    labels = [np.asarray(Image.open(out / name)) for name in ("floor.labels.png", "windows.labels.tif")]
    assert np.array_equal(*labels)
    # JPEG changes colours a little; the legend is left out.
    drawings = [
        np.asarray(Image.open(out / name).convert("RGB"), np.int16)
        for name in ("floor.overlay.jpg", "windows.overlay.tif")
    ]
    assert drawings[1].shape == (67, 91, 3)
    assert np.abs(drawings[0][:67] - drawings[1]).mean() < 4


@pytest.mark.long
def test_detector_on_tiles(run, detector, picture, tmp_path):
    config, checkpoint = detector
    out = tmp_path / "out"
    result = run("infer", config, picture, "--checkpoint", checkpoint, "--out", out, "--min-score", 0, "--tile", 48)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "floor.json").read_text())
    facts = record["tiles"]
    assert (facts["how"], facts["overlap"], facts["count"]) == ("boxes", 12, 6)
    for thing in record["things"]:
        left, top, right, bottom = thing["box"]
        assert 0 <= left <= right <= 91
        assert 0 <= top <= bottom <= 67
        assert rle.decode(thing["mask"]).shape == (67, 91)


@pytest.mark.long
def test_detector_on_tiles_of_a_picture_read_by_windows(run, detector, picture, tmp_path):
    pytest.importorskip("rasterio", reason="needs the extra 'huge'")
    config, checkpoint = detector
    out = tmp_path / "out"
    places = (picture, tiff_of(picture, tmp_path))
    result = run("infer", config, *places, "--checkpoint", checkpoint, "--out", out, "--min-score", 0, "--tile", 48)
    assert result.exit_code == 0, result.output
    records = [json.loads((out / f"{name}.json").read_text()) for name in ("floor", "windows")]
    assert records[0] | {"picture": None} == records[1] | {"picture": None}
    assert Image.open(out / "windows.overlay.tif").size == (91, 67)


def test_digits_that_are_no_decimal_digits(refused, picture, tmp_path):
    tiles = ("--tile", 64, "--overlap", "²")
    assert "neither auto nor blend" in refused("infer", "resnet10t", picture, *tiles, "--out", tmp_path / "out")
    assert "picture ² does not exist" in refused("infer", "resnet10t", "²", "--out", tmp_path / "out")


@pytest.mark.long
def test_refused_tiles(refused, trained, detector, picture, tmp_path):
    out = tmp_path / "out"
    (config, checkpoint), (detecting, weights) = trained, detector
    segment = ("infer", config, picture, "--checkpoint", checkpoint, "--out", out)
    said = refused(*segment, "--tile", 64)
    assert "looks too far" in said
    assert "--overlap blend" in said
    assert "use --tile 64" in refused(*segment, "--tile", 70, "--overlap", "auto")
    assert "from 0 to 63" in refused(*segment, "--tile", 64, "--overlap", 64)
    assert "neither auto nor blend" in refused(*segment, "--tile", 64, "--overlap", "some")
    assert "with --tile" in refused(*segment, "--overlap", 8)
    assert "leave --tile out" in refused(*segment, "--tile", 64, "--show-tokens")
    detect = ("infer", detecting, picture, "--checkpoint", weights, "--out", out, "--tile", 64)
    assert "is for segmentors" in refused(*detect, "--overlap", "blend")
    assert "this is a classifier" in refused("infer", "resnet10t", picture, "--tile", 64, "--out", out)
    assert not out.exists()

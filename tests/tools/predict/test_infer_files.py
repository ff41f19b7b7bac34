"""`terrazzo infer --runtime`: exported files give the same records and pictures as PyTorch."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from terrazzo.tools.data import rle
from terrazzo.tools.data.floors import FloorMaker

RUNTIMES = [("onnx", "onnx"), ("openvino", "xml")]
PYTORCH = [("pt2", "pt2"), pytest.param("aoti", "pt2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A picture of the files' input size, so that it is not resized."""
    path = tmp_path_factory.mktemp("square") / "floor.png"
    Image.fromarray(FloorMaker(seed=5, size=64).make().image).save(path)
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A function that exports a model to a file; a file is made once for each set of arguments."""
    files = {}

    def export(runtime, suffix, *arguments):
        key = (runtime, *map(str, arguments))
        if key not in files:
            file = tmp_path_factory.mktemp("exported") / f"model.{suffix}"
            result = run("export", *arguments, "--format", runtime, "--out", file)
            assert result.exit_code == 0, result.output
            files[key] = file
        return files[key]

    return export


def _both(run, tmp_path, runtime, file, model, checkpoint, picture, classes=(), options=()):
    """Compare the drawings by PyTorch and by an exported file, and return both records."""
    weights = ("--checkpoint", checkpoint, *classes)
    by_torch = run("infer", model, picture, *weights, *options, "--out", tmp_path / "torch")
    assert by_torch.exit_code == 0, by_torch.output
    by_file = run("infer", "--runtime", runtime, file, picture, *options, "--out", tmp_path / "file")
    assert by_file.exit_code == 0, by_file.output
    folders = (tmp_path / "torch", tmp_path / "file")
    records = [json.loads((folder / f"{picture.stem}.json").read_text()) for folder in folders]
    drawings = [Image.open(folder / f"{picture.stem}.overlay.jpg") for folder in folders]
    assert drawings[0].size == drawings[1].size
    difference = np.abs(np.subtract(*(np.asarray(drawing, np.int16) for drawing in drawings)))
    assert (difference > 8).mean() < 1e-3
    return records


@pytest.mark.long
@pytest.mark.parametrize(("runtime", "suffix"), RUNTIMES + PYTORCH)
def test_classifier(run, exported, picture, tmp_path, runtime, suffix):
    """Pictures are resized and cropped as in timm."""
    torch.manual_seed(0)
    checkpoint, classes = tmp_path / "weights.pth", ("--num-classes", 7)
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), checkpoint)
    file = exported(runtime, suffix, "resnet10t", checkpoint, *classes, "--size", 176, 176)
    mine, theirs = _both(run, tmp_path, runtime, file, "resnet10t", checkpoint, picture, classes)
    assert [entry["index"] for entry in mine["top"]] == [entry["index"] for entry in theirs["top"]]
    for one, other in zip(mine["top"], theirs["top"]):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("runtime", "suffix"), [RUNTIMES[0], pytest.param(*RUNTIMES[1], marks=pytest.mark.slow)])
def test_segmentor(run, exported, trained, square, tmp_path, runtime, suffix):
    file = exported(runtime, suffix, *trained, "--size", 64, 64)
    mine, theirs = _both(run, tmp_path, runtime, file, *trained, square)
    assert mine["classes"] == theirs["classes"]
    labels = [np.asarray(Image.open(tmp_path / name / "floor.labels.png")) for name in ("torch", "file")]
    assert (labels[0] != labels[1]).mean() < 1e-3


@pytest.mark.long
def test_segmentor_on_a_picture_of_another_size(run, exported, trained, picture, tmp_path):
    file = exported("onnx", "onnx", *trained, "--size", 64, 64)
    assert run("infer", "--runtime", "onnx", file, picture, "--out", tmp_path).exit_code == 0
    assert np.asarray(Image.open(tmp_path / "floor.labels.png")).shape == (67, 91)


def test_segmentor_on_tiles(run, refused, exported, trained, picture, tmp_path):
    file = exported("onnx", "onnx", *trained, "--size", 64, 64)
    by_file = ("infer", "--runtime", "onnx", file, picture, "--out", tmp_path / "file")
    by_torch = ("infer", trained[0], picture, "--checkpoint", trained[1], "--out", tmp_path / "torch")
    for call in (by_file, by_torch):
        result = run(*call, "--tile", 64, "--overlap", 8)
        assert result.exit_code == 0, result.output
    records = [json.loads((tmp_path / name / "floor.json").read_text()) for name in ("file", "torch")]
    assert records[0]["tiles"] == records[1]["tiles"] == {"how": "hard", "size": 64, "overlap": 8, "count": 4}
    labels = [np.asarray(Image.open(tmp_path / name / "floor.labels.png")) for name in ("file", "torch")]
    assert (labels[0] != labels[1]).mean() < 1e-3
    assert "takes images of 64x64, not tiles of 32x32" in refused(*by_file, "--tile", 32)
    assert "does not say how far" in refused(*by_file, "--tile", 64, "--overlap", "auto")


@pytest.mark.long
@pytest.mark.parametrize(
    ("runtime", "suffix"),
    [RUNTIMES[0], *(pytest.param(name, "pt2", marks=pytest.mark.slow) for name in ("pt2", "aoti"))],
)
def test_detector(run, exported, detector, square, tmp_path, runtime, suffix):
    file = exported(runtime, suffix, *detector, "--size", 64, 64)
    mine, theirs = _both(run, tmp_path, runtime, file, *detector, square, options=("--min-score", 0))
    assert len(mine["things"]) == len(theirs["things"]) > 0
    for one, other in zip(mine["things"], theirs["things"]):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["box"] == pytest.approx(other["box"], abs=0.05)
        assert (rle.decode(one["mask"]) != rle.decode(other["mask"])).mean() < 0.01


@pytest.mark.long
def test_refusals(run, refused, picture, tmp_path):
    call = ("infer", "--runtime", "onnx")
    assert "does not exist" in refused(*call, tmp_path / "none.onnx", picture)
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    assert "cannot load broken.onnx" in refused(*call, tmp_path / "broken.onnx", picture)
    (tmp_path / "broken.xml").write_bytes(b"not a graph")
    assert "cannot load broken.xml" in refused("infer", "--runtime", "openvino", tmp_path / "broken.xml", picture)
    (tmp_path / "broken.pt2").write_bytes(b"not a graph")
    for runtime in ("pt2", "aoti"):
        assert "cannot load broken.pt2" in refused("infer", "--runtime", runtime, tmp_path / "broken.pt2", picture)
    assert "holds its weights" in refused(*call, tmp_path / "broken.onnx", picture, "--device", "cpu")
    features = tmp_path / "features.onnx"
    assert run("export", "resnet10t", "--features", "--size", 32, 32, "--out", features).exit_code == 0
    assert "which cannot be drawn" in refused(*call, features, picture)

"""`terrazzo export --fp16` and `--int8`: the metric on the config's data decides, and a table holds the results."""

import csv
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from support import tiny_data

from terrazzo.openmmlab.config import load_config
from terrazzo.tools.export.precision import file_metric
from terrazzo.tools.export.precision.file_metric import FileMetric, training_pictures
from terrazzo.tools.predict.files import file_predictor

SIZE = ("--size", 64, 64)


def _table(path):
    with open(path) as file:
        return {(row["dtype"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory):
    root = tmp_path_factory.mktemp("nuclei")
    tiny_data.write_detection(root, ("nucleus",), (64, 64), masks=True)
    return root


@pytest.mark.long
def test_segmentor(run, trained, floors, tmp_path):
    """The file's metric equals the model's, the table holds both, and half precision loses almost nothing."""
    config, checkpoint = trained
    file = tmp_path / "floors.onnx"
    result = run("export", config, checkpoint, *SIZE, "--fp16", "--data-root", floors, "--out", file)
    assert result.exit_code == 0, result.output
    assert run("test", config, checkpoint, "--data-root", floors, "--out", tmp_path / "test.json").exit_code == 0
    table = _table(tmp_path / "floors.precision.csv")
    exact = json.loads((tmp_path / "test.json").read_text())["mIoU"]
    assert table["float32", "mIoU"] == pytest.approx(exact, abs=0.02)
    assert table["fp16", "mIoU"] == pytest.approx(exact, abs=0.5)
    assert table["fp16", "layers in float32"] == 0
    layers = [metric for dtype, metric in table if metric.startswith("error at ")]
    assert len(layers) == table["fp16", "layers"] > 20
    assert any("decode_head" in layer for layer in layers)
    assert table["fp16", "file size"] < 0.6 * table["float32", "file size"]
    model = onnx.load(file)
    assert {"precision", "task"} <= {entry.key for entry in model.metadata_props}
    assert not list(tmp_path.glob("*.failed"))
    image = Image.open(next((floors / "images" / "val").iterdir())).convert("RGB")
    assert file_predictor("onnx", file).results(image)["labels"].shape == (64, 64)


@pytest.mark.slow
def test_a_loss_that_is_too_large(run, trained, floors, tmp_path, monkeypatch):
    """The exit code is 1, the file has another name, and the table holds the effect of each layer alone."""
    config, checkpoint = trained
    points = iter([50.0] + [40.0] * 100)
    monkeypatch.setattr(file_metric.FileMetric, "__call__", lambda self, predictor: {"mIoU": next(points)})
    call = ("export", config, checkpoint, *SIZE, "--fp16", "--data-root", floors, "--out", tmp_path / "floors.onnx")
    result = run(*call, "--tolerance", 9)
    assert result.exit_code == 1, result.output
    assert "too much" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["floors.onnx.failed", "floors.precision.csv"]
    table = _table(tmp_path / "floors.precision.csv")
    assert table["fp16", "layers in float32"] > 0
    assert any(metric.endswith(" alone") for _, metric in table)


@pytest.mark.slow
def test_detector(run, detector, nuclei, tmp_path):
    """Boxes and masks are measured as in `terrazzo test`, on pictures of the file's size."""
    config, checkpoint = detector
    file = tmp_path / "nuclei.onnx"
    options = ("--data-root", nuclei, "--tolerance", 100)
    result = run("export", config, checkpoint, *SIZE, "--fp16", *options, "--out", file)
    assert result.exit_code == 0, result.output
    table = _table(tmp_path / "nuclei.precision.csv")
    assert ("float32", "coco/bbox_mAP_50") in table
    assert ("fp16", "coco/segm_mAP_75") in table
    found = [metric for _, metric in table if metric.startswith("error at ")]
    assert any("mask_head" in metric for metric in found)
    assert not any(metric.endswith(("roi_extractor", "roi_head")) for metric in found), "coordinates were rounded"


def test_detection_metric_is_that_of_the_labels(detector, nuclei):
    """A file that predicts the truth has 100 points; a file that finds nothing has no metric."""
    cfg = load_config(detector[0], nuclei)
    metric = FileMetric(cfg)

    class Oracle:
        def results(self, image):
            boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in tiny_data.objects()], dtype=torch.float32)
            masks = torch.zeros(len(boxes), image.height, image.width, dtype=torch.bool)
            for mask, (x, y, w, h) in zip(masks, tiny_data.objects()):
                mask[y : y + h, x : x + w] = True
            return {"boxes": boxes, "labels": torch.zeros(len(boxes)), "scores": torch.ones(len(boxes)), "masks": masks}

    class Blind:
        def results(self, image):
            empty = torch.zeros(0, image.height, image.width, dtype=torch.bool)
            return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0), "masks": empty}

    names = [f"coco/{kind}_mAP_{overlap}" for kind in ("bbox", "segm") for overlap in (50, 75)]
    assert metric(Oracle()) == pytest.approx(dict.fromkeys(names, 100))
    assert metric(Blind()) == {}


def test_classifier_metric(tmp_path):
    names = tuple(f"class{i}" for i in range(10))
    tiny_data.write_folders(tmp_path, names, (64, 64))
    options = {f"{split}_dataloader.dataset.metainfo.classes": names for split in ("train", "val", "test")}
    cfg = load_config("dinat-mini_1xb64-30e_eurosat64", tmp_path, options)
    cfg.train_dataloader.dataset.metainfo = cfg.test_dataloader.dataset.metainfo = {"classes": names}
    seen = []

    class Predictor:
        def results(self, image):
            seen.append(np.asarray(image))
            return {"scores": torch.eye(10)[len(seen) - 1 if len(seen) < 8 else 0]}

    assert FileMetric(cfg)(Predictor()) == pytest.approx({"accuracy/top1": 70})
    assert len(training_pictures(cfg, 4)) == 4


@pytest.mark.long
def test_a_model_without_data(run, tmp_path):
    """The error of the outputs decides, and the command says that this is weak evidence; INT8 needs pictures."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), weights)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(3):
        tiny_data.picture(np.random.default_rng(index), (80, 70)).save(pictures / f"{index}.jpg")
    for name, options in (("fp16", ()), ("int8", ("--pictures", pictures))):
        call = ("export", "resnet10t", weights, "--num-classes", 7, *SIZE, f"--{name}", *options)
        result = run(*call, "--format", "tensorrt", "--out", tmp_path / f"{name}.onnx")
        assert result.exit_code == 0, result.output
        assert "there is no test data to decide by" in result.output
        assert "every node is among the documented operators" in result.output
        table = _table(tmp_path / f"{name}.precision.csv")
        assert 0 < table[name, "error of the outputs"] < {"fp16": 1e-2, "int8": 1e-1}[name]
        assert (tmp_path / f"{name}.onnx").is_file()


@pytest.mark.long
def test_refusals(refused, trained, floors, tmp_path):
    config, checkpoint = trained
    out = ("--out", tmp_path / "x.onnx")
    assert "use --format onnx" in refused("export", "resnet10t", *SIZE, "--fp16", "--format", "pt2", *out)
    assert "--dynamic batch" in refused("export", "resnet10t", *SIZE, "--fp16", "--batch", 2, *out)
    assert "--pictures DIR" in refused("export", "resnet10t", *SIZE, "--int8", *out)
    assert "has no pictures" in refused("export", "resnet10t", *SIZE, "--int8", "--pictures", tmp_path, *out)
    gone = ("--data-root", tmp_path / "gone")
    assert "set --data-root" in refused("export", config, checkpoint, *SIZE, "--fp16", *gone, *out)
    assert "are for configs" in refused("export", "resnet10t", *SIZE, "--fp16", *gone, *out)
    assert not list(tmp_path.iterdir())

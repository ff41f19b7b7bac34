"""`terrazzo train`, `test`, `infer` and `export` of a restorer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoration import TINY, write_pictures

CONFIG = """
_base_ = ["terrazzo::restoration/restorer-unet_dinat-mini_super-resolution-x2_1xb8-10k_pictures-128x128.py"]
data_root = "{root}"
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, crop=32)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
model = dict(
    backbone=dict(_delete_=True, name="resnet10t", out_indices=(1, 2)), neck=dict(channels=4)
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")
    root = write_pictures(tmp_path_factory.mktemp("restoration"))
    (root / "config.py").write_text(CONFIG.format(root=root))
    return root


@pytest.fixture(scope="module")
def checkpoint(run, folder):
    """A checkpoint after two iterations."""
    result = run("train", folder / "config.py", "--work-dir", folder / "work", "--max-iters", 2, "--seed", 0)
    assert result.exit_code == 0, result.output
    assert "curves.png, examples.png" in result.output
    assert Image.open(folder / "work" / "examples.png").width > 3 * 320
    return folder / "work" / "iter_2.pth"


def test_test(run, folder, checkpoint, tmp_path):
    result = run("test", folder / "config.py", checkpoint, "--out", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["restoration/psnr_y"] == pytest.approx(metrics["restoration/input_psnr_y"], abs=1.0)
    assert 0 < metrics["restoration/ssim_rgb"] < 1


def test_infer(run, folder, checkpoint, tmp_path):
    places = (folder / "config.py", folder / "images" / "val", "--checkpoint", checkpoint)
    result = run("infer", *places, "--degrade", "--tile", 16, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "dB after" in result.output
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["tiles"]["how"] == "blend"
    assert record["after"]["psnr_y"] > 10
    assert Image.open(tmp_path / "0.restored.png").size == (52, 40)
    assert Image.open(tmp_path / "0.overlay.jpg").width > 3 * 52
    result = run("infer", *places, "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "plain" / "1.restored.png").size == (104, 80)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_export(run, folder, checkpoint, form, tmp_path):
    pytest.importorskip("openvino" if form == "openvino" else "onnxruntime", reason="needs the extra 'export'")
    file = tmp_path / ("model.onnx" if form == "onnx" else "model.xml")
    options = ("--format", form, "--size", 32, 48, "--dynamic", "hw", "--out", file)
    result = run("export", folder / "config.py", checkpoint, *options)
    assert result.exit_code == 0, result.output
    result = run("infer", file, folder / "images" / "val" / "0.png", "--runtime", form, "--out", tmp_path / "file")
    assert result.exit_code == 0, result.output
    result = run(
        *("infer", folder / "config.py", folder / "images" / "val" / "0.png", "--checkpoint", checkpoint),
        *("--out", tmp_path / "torch"),
    )
    assert result.exit_code == 0, result.output
    one, other = (np.asarray(Image.open(tmp_path / name / "0.restored.png")).astype(int) for name in ("file", "torch"))
    assert np.abs(one - other).max() <= 1


def test_a_network_of_timm(run, folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    result = run("export", TINY, "--size", 24, 24, "--out", tmp_path / "tiny.onnx")
    assert result.exit_code == 0, result.output
    picture = folder / "images" / "val" / "0.png"
    result = run("infer", TINY, picture, "--tile", 24, "--overlap", "auto", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "0.json").read_text())["tiles"]["how"] == "exact"


def test_an_exact_picture_has_no_psnr_in_json(run, tmp_path):
    """Black stays black through bicubic reduction and enlargement: its PSNR is infinite."""
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    result = run("infer", TINY, tmp_path / "black.png", "--degrade", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "PSNR on Y infinite (exact) before" in " ".join(result.output.split())

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / "out" / "black.json").read_text(), parse_constant=refuse)
    assert record["before"] == {"psnr_y": None, "ssim_y": 1.0, "psnr_rgb": None, "ssim_rgb": 1.0}


def test_refusals(refused, folder, checkpoint, tmp_path):
    config, picture = folder / "config.py", folder / "images" / "val" / "0.png"
    assert "leave --degrade out" in refused("infer", "resnet10t", picture, "--degrade", "--out", tmp_path / "out")
    assert "give it with --size H W" in refused("export", config, checkpoint)
    assert "no feature maps" in refused("export", TINY, "--features", "--size", 32, 32)
    assert "52x40 pixels, less than the crop of 64" in refused(
        "train", config, "--work-dir", tmp_path / "work", "--cfg-options", "train_dataloader.dataset.crop=64"
    )
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {"backbone.conv.weight": torch.zeros(1)}}, other)
    assert "does not fit this config" in refused(
        "infer", config, picture, "--checkpoint", other, "--out", tmp_path / "out"
    )
    assert "dd' is unknown" in refused(
        "test", config, checkpoint, "--cfg-options", "test_dataloader.dataset.degradation.type=dd"
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()

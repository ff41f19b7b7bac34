"""`terrazzo train`, `test`, `infer` and `export` of a restorer."""

import json

import numpy as np
import pytest
import timm
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


@pytest.mark.long
def test_test(run, folder, checkpoint, tmp_path):
    result = run("test", folder / "config.py", checkpoint, "--out", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["restoration/psnr_y"] == pytest.approx(metrics["restoration/input_psnr_y"], abs=1.0)
    assert 0 < metrics["restoration/ssim_rgb"] < 1


@pytest.mark.long
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


@pytest.mark.long
def test_a_network_of_timm(run, folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    result = run("export", TINY, "--size", 24, 24, "--out", tmp_path / "tiny.onnx")
    assert result.exit_code == 0, result.output
    picture = folder / "images" / "val" / "0.png"
    result = run("infer", TINY, picture, "--tile", 24, "--overlap", "auto", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "0.json").read_text())["tiles"]["how"] == "exact"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Three frames of 46 x 36 pixels, stored without loss."""
    pytest.importorskip("cv2", reason="needs the extra 'video'")
    from terrazzo.tools.data.clips import ClipWriter

    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    writer, random = ClipWriter(path, 10, None), np.random.default_rng(1)
    for _ in range(3):
        coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        writer.add(coarse.resize((46, 36), Image.Resampling.BICUBIC))
    writer.close()
    return path


@pytest.mark.parametrize("tile", [None, 20])
def test_video(run, refused, clip, tile, tmp_path):
    """Each frame of the restored video is the restored frame, to the bit."""
    import terrazzo
    from terrazzo.tools.data.clips import open_clip

    torch.manual_seed(0)
    torch.save(timm.create_model(TINY).state_dict(), tmp_path / "w.pth")
    out, options = tmp_path / "out", () if tile is None else ("--tile", tile)
    result = run("infer", TINY, clip, "--checkpoint", tmp_path / "w.pth", *options, "--batch", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["clip.jsonl", "clip.overlay.mp4", "clip.restored.mkv"]
    restored = open_clip(str(out / "clip.restored.mkv"), "restored", live=False)
    assert restored.rate == 10
    predictor = terrazzo.Predictor(TINY, tmp_path / "w.pth", tile=tile)
    frames = list(open_clip(str(clip), "clip", live=False).frames())
    found = list(restored.frames())
    assert len(frames) == len(found) == 3
    for frame, own in zip(frames, found):
        assert own.image.size == (92, 72)
        assert np.array_equal(np.asarray(own.image), np.asarray(predictor(frame.image).restored))
    record = json.loads((out / "clip.jsonl").read_text().splitlines()[2])
    assert (record["frame"], record["restored"]) == (2, {"width": 92, "height": 72})
    assert "--degrade is for pictures" in refused("infer", TINY, clip, "--degrade", "--out", tmp_path / "other")


def test_a_damaged_video_leaves_nothing(refused, tmp_path):
    pytest.importorskip("cv2", reason="needs the extra 'video'")
    video, out = tmp_path / "clip.mkv", tmp_path / "out"
    video.write_bytes(b"no video")
    assert "is damaged, empty or in no format" in refused("infer", TINY, video, "--out", out)
    assert not out.exists()


def test_odd_sides_of_a_video(tmp_path):
    """The last pixels are there twice."""
    pytest.importorskip("cv2", reason="needs the extra 'video'")
    from terrazzo.tools.data.clips import ClipWriter, open_clip

    pixels = np.random.default_rng(0).integers(0, 255, (17, 21, 3), dtype=np.uint8)
    writer = ClipWriter(tmp_path / "odd.mkv", 10, None)
    writer.add(Image.fromarray(pixels))
    writer.close()
    (frame,) = open_clip(str(tmp_path / "odd.mkv"), "odd", live=False).frames()
    assert np.array_equal(np.asarray(frame.image), np.pad(pixels, ((0, 1), (0, 1), (0, 0)), mode="edge"))


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

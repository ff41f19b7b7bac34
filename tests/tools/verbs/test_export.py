"""`terrazzo export`: classifiers, segmentors, and refusals."""

import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from terrazzo.tools.export import checked as checked_export
from terrazzo.tools.export.run import form_of
from terrazzo.tools.export.suffixes import SUFFIXES
from terrazzo.tools.export.tensorrt import operators as tensorrt_operators
from terrazzo.tools.verbs import export


@pytest.mark.long
def test_classifier(run, tmp_path):
    path = tmp_path / "model.onnx"
    result = run("export", "resnet10t", "--size", 65, 40, "--batch", 2, "--out", path)
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == [2, 3, 65, 40]
    assert session.get_outputs()[0].shape == [2, 1000]
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert facts["model"] == "resnet10t"
    assert "normalisation is in the graph" in facts["input"]
    assert len(json.loads(facts["classes"])) == 1000


@pytest.mark.long
def test_normalisation_is_in_the_graph(run, tmp_path):
    """The file with raw pixels gives the same result as the model with normalised pixels."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "model.onnx"
    weights = (tmp_path / "weights.pth", "--num-classes", 7)
    assert run("export", "resnet10t", *weights, "--size", 64, 64, "--out", path).exit_code == 0
    pixels = 255 * torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((pixels / 255 - mean) / std).numpy()
    found = onnxruntime.InferenceSession(path).run(None, {"image": pixels.numpy()})[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet10t", pytest.param("dinat_mini", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("openvino", ["m.bin", "m.xml"]),
        ("pt2", ["m.pt2"]),
        pytest.param("aoti", ["m.pt2"], marks=pytest.mark.slow),  # compilation takes a minute or more
    ],
)
def test_other_formats(run, tmp_path, form, names, name):
    path = tmp_path / names[-1]
    arguments = ("--format", form, "--size", 64, 96, "--dynamic", "batch", "--num-classes", 7)
    result = run("export", name, *arguments, "--out", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == names


@pytest.mark.long
def test_the_suffix_says_the_format(run, tmp_path):
    result = run("export", "resnet10t", "--size", 64, 64, "--out", tmp_path / "m.pt2")
    assert result.exit_code == 0, result.output
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_suffixes_agree_with_what_the_formats_write():
    for name, suffixes in SUFFIXES.items():
        assert form_of(name, None, lacking="no GPU").suffixes[0] in suffixes


@pytest.mark.long
def test_failed_weights_lie_beside_the_failed_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checked_export, "compare", _always_wrong)
    result = run("export", "resnet10t", "--format", "openvino", "--size", 32, 32, "--out", tmp_path / "m.xml")
    assert result.exit_code == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin.failed", "m.xml.failed"]


@pytest.mark.long
def test_tensorrt_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "why_no_engine", lambda: "no GPU")
    path = tmp_path / "m.engine"
    result = run("export", "resnet10t", "--format", "tensorrt", "--size", 64, 64, "--out", path)
    assert result.exit_code == 0, result.output
    assert "no engine was built: no GPU" in result.stdout
    assert "trtexec --onnx=m.onnx --saveEngine=m.engine --stronglyTyped --noTF32\n" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.long
def test_tensorrt_names_what_it_does_not_document(run, tmp_path, monkeypatch):
    table = dict(tensorrt_operators.operators(), Relu=frozenset())
    monkeypatch.setattr(tensorrt_operators, "operators", lambda: table)
    monkeypatch.setattr(export, "why_no_engine", lambda: "no GPU")
    result = run("export", "resnet10t", "--format", "tensorrt", "--size", 32, 32, "--out", tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert "does not support Relu" in result.stderr


def test_any_size(run, tmp_path):
    path = tmp_path / "m.onnx"
    arguments = ("--num-classes", 7, "--size", 64, 96, "--dynamic", "hw", "--dynamic", "batch", "--out", path)
    result = run("export", "resnet10t", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 4
    session = onnxruntime.InferenceSession(path)
    assert session.run(None, {"image": np.zeros((3, 3, 70, 41), np.float32)})[0].shape == (3, 7)


@pytest.mark.long
def test_one_size_of_neighborhood_attention(refused, tmp_path):
    reason = refused("export", "dinat_mini", "--size", 64, 64, "--dynamic", "hw", "--out", tmp_path / "m.onnx")
    assert "images of one size" in reason
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_features(run, tmp_path):
    path = tmp_path / "m.onnx"
    result = run("export", "resnet10t", "--features", "--size", 64, 96, "--out", path)
    assert result.exit_code == 0, result.output
    shapes = {value.name: value.shape for value in onnxruntime.InferenceSession(path).get_outputs()}
    assert list(shapes) == ["stride2", "stride4", "stride8", "stride16", "stride32"]
    assert shapes["stride32"] == [1, 512, 2, 3]


@pytest.mark.long
def test_segmentor(run, trained, floors, tmp_path):
    config, checkpoint = trained
    path = tmp_path / "segmentor.onnx"
    result = run("export", config, checkpoint, "--dynamic", "batch", "--out", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 6
    image = Image.open(floors / "images" / "val" / "floor_0000.png")
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    logits, labels = onnxruntime.InferenceSession(path).run(None, {"image": pixels})
    assert logits.shape == (1, 6, 64, 64)
    assert labels.shape == (1, 64, 64)
    # The file predicts the same classes as `terrazzo infer`, which uses mmseg's pipeline.
    run("infer", config, floors / "images" / "val" / "floor_0000.png", "--checkpoint", checkpoint, "--out", tmp_path)
    inferred = np.asarray(Image.open(tmp_path / "floor_0000.labels.png"))
    assert (labels[0] != inferred).mean() < 1e-3


@pytest.mark.long
def test_failing_parity_is_exit_code_1(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checked_export, "compare", _always_wrong)
    result = run("export", "resnet10t", "--size", 32, 32, "--out", tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert "disagree" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx.failed"]


def _always_wrong(names, source, *rest):
    return tuple(checked_export.Parity(name, source, 1.0, 1e-4, False) for name in names)


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_place_that_cannot_be_written(refused, tmp_path, monkeypatch, form):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or mode != os.W_OK)
    out = tmp_path / "new" / f"m{SUFFIXES[form][0]}"
    assert f"{tmp_path} is read-only" in refused("export", "resnet10t", "--format", form, "--out", out)
    assert not list(tmp_path.iterdir())


def test_no_loops_for_one_size_alone(refused):
    reason = refused("export", "resnet10t", "--no-loops", "--dynamic", "hw")
    assert "unrolls a scan of known length" in reason


@pytest.mark.long
def test_refusals(refused, trained, tmp_path):
    config, _ = trained
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    out = ("--out", tmp_path / "out" / "model.onnx")
    assert "No pretrained weights exist for s2aformer_mini" in refused("export", "s2aformer_mini", "--pretrained", *out)
    assert "dinat_mini" in refused("export", "dinat_minny", *out)
    assert "did you mean" in refused("export", "fpn_dinat-mini_flors.py", *out)
    assert "needs weights" in refused("export", config, *out)
    assert "does not exist" in refused("export", config, tmp_path / "none.pth", *out)
    assert "is refused" in refused("export", config, tmp_path / "broken.pth", *out)
    assert "does not exist" in refused("export", "resnet10t", tmp_path / "none.pth", *out)
    assert "is a file" in refused("export", "resnet10t", "--out", tmp_path / "broken.pth" / "model.onnx")
    assert "is a folder" in refused("export", "resnet10t", "--out", tmp_path)
    for option, value in (("--tolerance", 3), ("--pictures", tmp_path)):
        assert f"{option} is for --fp16 and --int8" in refused("export", "resnet10t", option, value, *out)
    assert "at least 1" in refused("export", "resnet10t", "--size", 0, 8, *out)
    assert "resnet10t takes 32x32 and larger" in refused("export", "resnet10t", "--size", 31, 64, *out)
    crossvit = "crossvit_9_240"
    assert "the model cannot take images of 1x3x96x96: " in refused("export", crossvit, "--size", 96, 96, *out)
    for opset in (17, 99):
        reason = refused("export", "resnet10t", "--opset", opset, *out)
        assert f"the opset is {opset}; PyTorch writes 18 to " in reason
    assert "no config file" in refused("export", tmp_path / "none.py", *out)
    assert "takes 32x32 and larger" in refused("export", *trained, "--size", 16, 96, *out)
    for form in ("pt2", "aoti"):
        assert f"{form} files have no opset" in refused("export", "resnet10t", "--format", form, "--opset", 20, *out)
    assert "must end in .xml" in refused("export", "resnet10t", "--format", "openvino", "--size", 32, 32, *out)
    for wrong in ("model", "model.tflite", "v1.5"):
        reason = refused("export", "resnet10t", "--out", tmp_path / "out" / wrong)
        assert f"{wrong} must end in .onnx, .engine, .xml or .pt2, which say the format" in reason
    assert "--features is for timm models" in refused("export", config, "--features", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", [3, 1000])
def test_checkpoint_of_other_classes(refused, tmp_path, classes):
    model = timm.create_model("resnet10t", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "five.pth")
    arguments = (tmp_path / "five.pth", "--num-classes", classes, "--out", tmp_path / "model.onnx")
    assert "shape" in refused("export", "resnet10t", *arguments)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_segmentor_with_deformable_attention(run, tmp_path):
    """Mask2Former's results are compared with the results of mmseg's code."""
    from mmengine.registry import MODELS

    from terrazzo.openmmlab.config import load_config

    small = {"num_queries": 20, "pixel_decoder.encoder.num_layers": 1, "transformer_decoder.num_layers": 2}
    options = {f"model.decode_head.{key}": value for key, value in small.items()}
    cfg = load_config("mask2former_dinat-large_8xb2-160k_ade20k-640x640", None, options)
    cfg.model.backbone = dict(type="TerrazzoBackbone", name="resnet10t", out_indices=[1, 2, 3, 4])
    cfg.model.decode_head.in_channels = [64, 128, 256, 512]
    cfg.dump(tmp_path / "mask2former.py")
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, tmp_path / "weights.pth")
    arguments = (tmp_path / "weights.pth", "--size", 96, 128, "--out", tmp_path / "model.onnx")
    result = run("export", tmp_path / "mask2former.py", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 4

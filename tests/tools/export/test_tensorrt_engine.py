"""Engines through a fake of TensorRT's Python API on the CPU, and the messages without a GPU."""

import contextlib
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support import fake_tensorrt
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools.export.checked import checked_export
from terrazzo.tools.export.formats.onnx import OnnxForm
from terrazzo.tools.export.precision.lowering import lower_file
from terrazzo.tools.export.tensorrt import plan as tensorrt_plan
from terrazzo.tools.verbs import export


@pytest.fixture
def engines(monkeypatch):
    """The module that builds engines, on a fake machine with a GPU and TensorRT."""
    monkeypatch.setattr(export, "why_no_engine", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    name, user = "terrazzo.tools.export.tensorrt.engine", "terrazzo.tools.export.precision.engine"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    stream = SimpleNamespace(cuda_stream=fake_tensorrt.STREAM, synchronize=lambda: None)
    cuda = SimpleNamespace(get_device_name=lambda: "a GPU", Stream=lambda: stream, stream=contextlib.nullcontext)
    monkeypatch.setattr(module, "cuda", cuda)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    yield module
    sys.modules.pop(name)
    sys.modules.pop(user, None)  # it imported names from that module


@pytest.mark.long
def test_is_checked_and_timed(run, engines, tmp_path):
    arguments = ("--format", "tensorrt", "--size", 64, 96, "--dynamic", "batch", "--dynamic", "hw", "--num-classes", 7)
    result = run("export", "resnet10t", *arguments, "--out", tmp_path / "m.onnx")
    assert result.exit_code == 0, result.output
    assert "TensorRT against PyTorch" in result.stdout
    assert result.stdout.count("passed") == 4
    assert "engine of TensorRT 10.15.1.29 for a GPU, from 1x3x32x48 to 4x3x128x192" in result.stdout
    assert "a run of 1x3x64x96 takes" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.engine"]


class Found(nn.Module):
    """A module that returns the bright pixels of an image, their places and a mask."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = x.flatten()
        places = (values > 0.5).float().nonzero().squeeze(1)
        return values[places], places, (x > 0.5).float().to(torch.uint8)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def test_sizes_that_are_computed(engines, image, tmp_path):
    """Outputs have the file's order and types, and may change their size from run to run."""
    form = engines.EngineForm(OnnxForm())
    checks = {"darker": 0.6 * image, "nothing": 0 * image}
    report = checked_export(form, Found(), image, tmp_path / "m.engine", checks=checks)
    assert report.passed
    values, places, inside = form.engine(image)
    assert (values.dtype, places.dtype, inside.dtype) == (torch.float32, torch.int64, torch.uint8)
    assert len(places) == inside.sum() > 0
    assert form.engine(0 * image)[0].shape == (0,)


@pytest.mark.long
def test_lower_precision(run, engines, tmp_path):
    """The engine is built from the lowered file, and compared with the float32 file."""
    arguments = ("--format", "tensorrt", "--size", 64, 96, "--num-classes", 7, "--fp16")
    result = run("export", "resnet10t", *arguments, "--out", tmp_path / "m.engine")
    assert result.exit_code == 0, result.output
    assert "differ from float32 by" in result.stdout
    assert "ms on the GPU" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx", "m.precision.csv"]


@pytest.mark.long
def test_an_engine_that_loses_too_much(engines, image, tmp_path, monkeypatch):
    """The config's metric decides about the engine, as it does about the file."""
    from terrazzo.tools.export.precision.engine import lowered_engine

    torch.manual_seed(0)
    plain = tmp_path / "plain.onnx"
    facts = {"task": "segmentation", "preparation": "{}", "outputs": "logits, labels"}

    class Segmentor(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            logits = self.conv(x)
            return logits, logits.argmax(1)

    checked_export(OnnxForm(), Segmentor(), image, plain, output_names=("logits", "labels"), metadata=facts)
    result = lower_file(plain, "fp16", tmp_path / "m.onnx", [(image,)], lambda path: {"mIoU": 70.0}, 0.5, "model")
    shapes = tensorrt_plan.ranges(["image"], [image.shape], ())
    for found, name in ((69.8, "m.engine"), (69.2, "m.engine.failed")):

        def metric(predictor, found=found):
            picture = Image.new("RGB", (12, 8))
            assert predictor.results(picture)["labels"].shape == (8, 12)
            return {"mIoU": found}

        passed = lowered_engine(result, plain, tmp_path / "m.engine", shapes, [(image,)], metric, 0.5)
        assert passed == (name == "m.engine")
        assert (tmp_path / name).is_file()


@pytest.mark.slow
def test_a_detector(run, engines, detector, tmp_path):
    config, checkpoint = detector
    result = run("export", config, checkpoint, "--format", "tensorrt", "--size", 64, 64, "--out", tmp_path / "m.engine")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 8


@pytest.mark.long
def test_results_that_differ_fail(engines, image, tmp_path):
    form = engines.EngineForm(OnnxForm())
    report = checked_export(form, Found(), image, tmp_path / "m.engine", reference=lambda x: Found()(x + 0.01))
    assert not report.passed
    assert "the traced program itself differs" in report.divergence
    assert [path.name for path in tmp_path.iterdir()] == ["m.engine.failed"]


@pytest.mark.long
def test_refusals(engines, image, tmp_path, monkeypatch):
    form, path = engines.EngineForm(OnnxForm()), tmp_path / "m.engine"
    monkeypatch.setattr(fake_tensorrt, "REFUSED", "NonZero")
    with pytest.raises(InputError, match=r"does not take NonZero \(node_NonZero_\d+\): no importer registered"):
        checked_export(form, Found(), image, path)
    monkeypatch.setattr(fake_tensorrt, "REFUSED", None)
    monkeypatch.setattr(engines, "ranges", lambda *_: {"image": ((1, 3, 8, 12), (1, 3, 8, 12), (2, 3, 8, 12))})
    with pytest.raises(InputError, match=r"cannot build the engine: IBuilder::buildSerializedNetwork: Error Code 4$"):
        checked_export(form, Found(), image, path)
    monkeypatch.setattr(fake_tensorrt, "__version__", "8.6.1")
    with pytest.raises(InputError, match=r"TensorRT 10 or later is needed, and this is 8\.6\.1"):
        engines.EngineForm(OnnxForm())
    assert not list(tmp_path.iterdir())


def test_ranges():
    fixed = (2, 3, 64, 40)
    assert tensorrt_plan.ranges(["x"], [fixed], ()) == {"x": (fixed, fixed, fixed)}
    assert tensorrt_plan.ranges(["x"], [fixed], ["batch"])["x"] == ((1, 3, 64, 40), fixed, (8, 3, 64, 40))
    smallest, _, largest = tensorrt_plan.ranges(["x"], [fixed], ["hw"])["x"]
    assert smallest == (2, 3, 32, 32)
    assert largest == (2, 3, 128, 105)  # the export tries images that are 65 wider


def test_trtexec():
    fixed = tensorrt_plan.ranges(["image"], [(1, 3, 64, 64)], ())
    command = "trtexec --onnx=m.onnx --saveEngine=m.engine --stronglyTyped --noTF32"
    assert tensorrt_plan.trtexec("m.onnx", "m.engine", fixed) == command
    opened = tensorrt_plan.ranges(["image"], [(1, 3, 64, 64)], ["batch"])
    shapes = " --minShapes=image:1x3x64x64 --optShapes=image:1x3x64x64 --maxShapes=image:4x3x64x64"
    assert tensorrt_plan.trtexec("m.onnx", "m.engine", opened) == command + shapes


@pytest.mark.parametrize(("gpu", "package", "reason"), [(False, True, "no NVIDIA GPU"), (True, False, "not installed")])
def test_what_is_lacking(monkeypatch, gpu, package, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(tensorrt_plan.importlib.util, "find_spec", lambda name: package or None)
    assert reason in tensorrt_plan.why_no_engine()

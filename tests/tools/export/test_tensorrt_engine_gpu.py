"""Engines on a real GPU with TensorRT, beyond the limits of the fake on the CPU."""

import pytest

from terrazzo.tools.export.tensorrt.plan import why_no_engine

if why_no_engine() is not None:
    pytest.skip(f"{why_no_engine()}: no engine was built", allow_module_level=True)


@pytest.mark.parametrize(("name", "dynamic"), [("resnet10t", ("--dynamic", "batch")), ("dinat_mini", ())])
def test_a_classifier(run, tmp_path, name, dynamic):
    arguments = ("--format", "tensorrt", "--size", 224, 224, *dynamic, "--out", tmp_path / "m.engine")
    result = run("export", name, *arguments)
    assert result.exit_code == 0, result.output
    assert "engine of TensorRT" in result.stdout
    assert "ms on the GPU" in result.stdout


def test_a_detector(run, detector, tmp_path):
    """The lengths of outputs are the numbers of detections."""
    config, checkpoint = detector
    result = run("export", config, checkpoint, "--format", "tensorrt", "--size", 64, 64, "--out", tmp_path / "m.engine")
    assert result.exit_code == 0, result.output

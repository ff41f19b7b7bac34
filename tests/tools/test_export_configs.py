"""Every config exports to ONNX at its full size of model, on small images, and the file gives what PyTorch gives."""

import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from lively import enliven
from mmengine.registry import MODELS

from terrazzo.openmmlab.config import load_config, packaged_configs
from terrazzo.tools import mm, tensorrt_operators

SIZES = {"classification": (64, 96), "segmentation": (64, 96), "detection": (96, 128), "panoptic": (96, 128)}


@pytest.fixture
def folder():
    """A folder that is gone at once: pytest keeps those of its own, and these hold gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in packaged_configs() if not name.startswith("_")])
def test_exports(run, folder, name):
    cfg = load_config(name, None, {"model.backbone.pretrained": False})
    task = mm.task_of(cfg)
    torch.manual_seed(0)
    with mm.quiet():
        model = MODELS.build(cfg.model).eval()
    if task in ("detection", "panoptic"):
        enliven(model, name, SIZES[task])
    checkpoint, path = folder / "weights.pth", folder / "model.onnx"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    del model
    result = run("export", name, checkpoint, "--size", *SIZES[task], "--out", path)
    assert result.exit_code == 0, result.output
    assert "nothing" not in result.output
    assert not tensorrt_operators.problems(onnx.load(path))

"""Configs export full-size models to ONNX, on small images, with PyTorch's results.

Pretraining and models of several tasks have nothing to export.
"""

import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from mmengine.registry import MODELS
from support.lively import enliven

from terrazzo.openmmlab.config import load_config, packaged_configs
from terrazzo.tools import mm
from terrazzo.tools.export.tensorrt import operators as tensorrt_operators

SIZES = {"classification": (64, 96), "segmentation": (64, 96), "detection": (96, 128), "panoptic": (96, 128)}


@pytest.fixture
def folder():
    """A folder that is removed after the test; pytest would keep its folder, with gigabytes of files."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


OTHERS = ("conversion", "multitask", "pose", "pretraining", "rotated")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, path in packaged_configs().items() if path.parent.name not in OTHERS])
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


def test_pretraining_has_nothing_to_export(run, tmp_path):
    (tmp_path / "weights.pth").touch()
    result = run("export", "roma-tiny_1xb64-100e_eurosat64", tmp_path / "weights.pth", "--size", 64, 64)
    assert result.exit_code == 2
    assert "RoMAPretraining, is for none of these tasks: classification" in result.output

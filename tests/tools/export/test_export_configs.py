"""Configs export full-size models to ONNX, on small images, with PyTorch's results.

Pretraining and models of several tasks have nothing to export.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS
from support.lively import enliven

from terrazzo.backbones._hosts import record_of
from terrazzo.openmmlab.config import load_config, packaged_configs
from terrazzo.tools import mm
from terrazzo.tools.export.exportable import RawSegmentor
from terrazzo.tools.export.tensorrt import operators as tensorrt_operators

SIZES = {"classification": (64, 96), "segmentation": (64, 96), "detection": (96, 128), "panoptic": (96, 128)}


@pytest.fixture
def folder():
    """A folder that is removed after the test; pytest would keep its folder, with gigabytes of files."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


OTHERS = ("conversion", "multitask", "pose", "pretraining", "rotated", "zoom")


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


@pytest.mark.slow
def test_a_converted_segmentor_of_any_size(run, folder):
    """Open height and width: the file is right for other sizes than the example's, which need other padding."""
    name = "fpn_vit-tiny-converted_1xb4-10k_camvid-480x360"
    cfg = load_config(name)
    torch.manual_seed(0)
    with mm.quiet():
        model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        for block in model.backbone.model.blocks:  # attention is far from uniform
            block.attn.qkv.weight.mul_(12)
            block.attn.mixer.query_map.mul_(2)
    checkpoint, path = folder / "weights.pth", folder / "model.onnx"
    meta = {"terrazzo.changes": record_of(model)}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, checkpoint)
    result = run("export", name, checkpoint, "--size", 64, 96, "--dynamic", "hw", "--out", path)
    assert result.exit_code == 0, result.output
    session, module = onnxruntime.InferenceSession(path), RawSegmentor(model).eval()
    assert json.loads(session.get_modelmeta().custom_metadata_map["terrazzo.changes"]) == meta["terrazzo.changes"]
    for size in ((50, 120), (112, 80)):
        image = 255 * torch.rand(1, 3, *size)
        with torch.no_grad():
            logits, labels = (wanted.numpy() for wanted in module(image))
        found = dict(zip([x.name for x in session.get_outputs()], session.run(None, {"image": image.numpy()})))
        assert np.abs(found["logits"] - logits).max() < 1e-4 * np.abs(logits).max()
        assert (found["labels"] == labels).mean() > 0.999


def test_pretraining_has_nothing_to_export(run, tmp_path):
    (tmp_path / "weights.pth").touch()
    result = run("export", "roma-tiny_1xb64-100e_eurosat64", tmp_path / "weights.pth", "--size", 64, 64)
    assert result.exit_code == 2
    assert "RoMAPretraining, is for none of these tasks: classification" in result.output

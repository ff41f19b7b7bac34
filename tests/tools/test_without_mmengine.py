"""Verbs on models of timm need nothing of OpenMMLab: they run in a process in which importing any of it fails."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

CODE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg") or name.startswith("terrazzo.openmmlab"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refusing())
from terrazzo.tools.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["terrazzo", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
"""
MODEL, VIT = "dinat_mini", "test_vit"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints, one of them as mmengine writes it, and a picture."""
    folder = tmp_path_factory.mktemp("files")
    logging = pytest.importorskip("mmengine.logging", reason="needs the extra 'openmmlab'")
    torch.manual_seed(0)
    weights = timm.create_model(MODEL, num_classes=3).state_dict()
    history = logging.HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": weights, "message_hub": {"log_scalars": {"loss": history}}}, folder / "weights.pth")
    torch.save(timm.create_model(VIT).state_dict(), folder / "vit.pth")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "picture.png")
    return folder


VERBS = [
    ("list", "dinat"),
    ("info", MODEL),
    ("explain", MODEL, "--size", "64", "64"),
    ("convert", "weights.pth", "weights.safetensors"),
    ("infer", MODEL, "picture.png", "--checkpoint", "weights.pth", "--num-classes", "3", "--device", "cpu"),
    ("infer", "mctf_deit_tiny", "picture.png", "--show-tokens", "--device", "cpu"),
    ("export", MODEL, "weights.pth", "--num-classes", "3", "--format", "pt2", "--size", "64", "64"),
    ("export", MODEL, "weights.pth", "--num-classes", "3", "--size", "64", "64"),
    ("bench", "reduce", VIT, "--checkpoint", "vit.pth", "--device", "cpu", "--seconds", "0.01", "--batch", "1"),
]


def test_verbs(files):
    """One process for all: each would import PyTorch and timm again."""
    lines = "\n".join(map(" ".join, VERBS))
    done = subprocess.run([sys.executable, "-c", CODE], input=lines, capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr[-2000:]

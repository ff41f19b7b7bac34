"""Verbs on models of timm need nothing of OpenMMLab: they run in a process in which importing any of it fails."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.processes import run_code

CODE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg") or name.startswith("terrazzo.openmmlab"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refusing())
from support.processes import run_code
from terrazzo.tools.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["terrazzo", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
"""
MODEL, VIT, QUICK = "dinat_mini", "test_vit", "resnet10t"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints, one of them as mmengine writes it, and a picture."""
    folder = tmp_path_factory.mktemp("files")
    logging = pytest.importorskip("mmengine.logging", reason="needs the extra 'openmmlab'")
    torch.manual_seed(0)
    weights = timm.create_model(MODEL, num_classes=3).state_dict()
    history = logging.HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": weights, "message_hub": {"log_scalars": {"loss": history}}}, folder / "weights.pth")
    for name in (VIT, QUICK):
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "picture.png")
    return folder


VERBS = [
    ("list", "dinat"),
    ("info", MODEL),
    ("explain", MODEL, "--size", "64", "64"),
    ("convert", "weights.pth", "weights.safetensors"),
    ("infer", MODEL, "picture.png", "--checkpoint", "weights.pth", "--num-classes", "3", "--device", "cpu"),
    ("infer", "mctf_deit_tiny", "picture.png", "--show-tokens", "--device", "cpu"),
    ("export", QUICK, f"{QUICK}.pth", "--format", "pt2", "--size", "64", "64"),
    ("export", QUICK, f"{QUICK}.pth", "--size", "64", "64"),
    ("bench", "reduce", VIT, "--checkpoint", f"{VIT}.pth", "--device", "cpu", "--seconds", "0.01", "--batch", "1"),
]


@pytest.mark.long
def test_verbs(files):
    """One process for all: each would import PyTorch and timm again."""
    lines = "\n".join(map(" ".join, VERBS))
    done = run_code(CODE, stdin=lines, cwd=files)
    assert done.returncode == 0, done.stderr[-2000:]

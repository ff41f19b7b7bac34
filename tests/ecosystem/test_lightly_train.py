"""lightly-train: pretraining of a model by name; the exported file loads into timm."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.processes import run_code

import terrazzo  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lightly_train") is None, reason="needs the extra 'ecosystem'"),
]

CODE = """
import json, sys, terrazzo, lightly_train

lightly_train.pretrain(
    out=sys.argv[2], data=sys.argv[1], model=sys.argv[3], method="simclr", epochs=1, batch_size=2, embed_dim=16,
    num_workers=0, accelerator="cpu", devices=1, precision="32-true", transform_args={"image_size": (64, 64)},
    model_args=json.loads(sys.argv[4]),
)
"""


@pytest.mark.parametrize(("name", "options"), [("fmvit_tiny", {}), ("dinat_mini", {"output_fmt": "NCHW"})])
def test_pretrains_and_exports(name, options, tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 80, 3)).astype(np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    # In a process of its own: lightly-train sets up logging and seeds of the whole process.
    done = run_code(CODE, tmp_path / "data", tmp_path / "out", f"timm/{name}", json.dumps(options))
    assert done.returncode == 0, done.stderr[-2000:]
    exported = torch.load(tmp_path / "out" / "exported_models" / "exported_last.pt", weights_only=True)
    model = timm.create_model(name).eval()
    model.load_state_dict(exported)
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    for key, weight in model.state_dict().items():
        assert any(torch.equal(weight, trained) for trained in checkpoint.values() if trained.shape == weight.shape), (
            key
        )

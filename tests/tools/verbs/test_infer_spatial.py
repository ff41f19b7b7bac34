"""`terrazzo infer --spatial R`: several processes give the results of one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run_code

SMALL = """
_base_ = ["{base}"]
model = dict(
    backbone=dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), dilations=[[3], [1], [1], [1]]),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=16),
)
"""


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A config of a small segmentor, and a checkpoint with random weights."""
    from mmengine.registry import MODELS, init_default_scope

    from terrazzo.openmmlab.config import load_config, packaged_configs

    folder = tmp_path_factory.mktemp("segmentor")
    config, checkpoint = folder / "small.py", folder / "small.pth"
    config.write_text(SMALL.format(base=packaged_configs()["fpn_dinat-mini_floors"]))
    cfg = load_config(config)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, checkpoint)
    return config, checkpoint


@pytest.mark.slow  # 20 seconds: processes that import PyTorch and mmsegmentation
def test_two_processes_give_the_results_of_one(run, segmentor, tmp_path):
    """Pictures whose maps have odd heights, and one that is too small for two processes."""
    config, checkpoint = segmentor
    random = np.random.default_rng(0)
    for name, size in {"a": (90, 200), "b": (91, 67), "c": (64, 40)}.items():
        small = Image.fromarray(random.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        (tmp_path / "in").mkdir(exist_ok=True)
        small.resize(size).save(tmp_path / "in" / f"{name}.png")
    arguments = ("infer", config, tmp_path / "in", "--checkpoint", checkpoint, "--device", "cpu", "--out")
    alone = run(*arguments, tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    code = "from terrazzo.tools.cli import main; main()"
    shared = run_code(code, *arguments, tmp_path / "shared", "--spatial", 2, timeout=1200)
    assert shared.returncode == 0, shared.stderr
    assert shared.stderr == ""
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    for name in "abc":
        maps = [np.asarray(Image.open(tmp_path / kind / f"{name}.labels.png")) for kind in ("alone", "shared")]
        assert maps[0].shape == maps[1].shape
        assert (maps[0] != maps[1]).mean() < 1e-3  # rounding decides between classes that are equally likely
        assert json.loads((tmp_path / "shared" / f"{name}.json").read_text())["task"] == "segmentation"


def test_refusals(refused, segmentor, picture, tmp_path, monkeypatch):
    config, checkpoint = segmentor
    out = ("--out", tmp_path / "out", "--device", "cpu")
    assert "only for segmentors" in refused("infer", "resnet10t", picture, *out, "--spatial", 2)
    text = refused("infer", config, picture, "--checkpoint", checkpoint, *out, "--spatial", 2, "--show-tokens")
    assert "leave --runtime, --show-tokens and --tile out" in text
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = refused("infer", config, picture, "--checkpoint", checkpoint, *out, "--spatial", 2)
    assert "2 processes, and 3 were started" in text


def test_a_module_that_is_not_known_is_refused_by_name(refused, trained, picture, tmp_path):
    config, checkpoint = trained
    text = refused("infer", config, picture, "--checkpoint", checkpoint, "--out", tmp_path / "out", "--spatial", 2)
    assert "backbone" in text
    assert "no entry" in text

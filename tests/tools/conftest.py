"""What the tests of the command share: running it, tiny data, and a segmentor that was trained for two iterations."""

import copy
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from support.processes import run_code

from terrazzo.tools.cli import cli
from terrazzo.tools.data.floors import FloorMaker, write_floors

BACKBONE = {"model.backbone.name": "resnet10t", "model.backbone.out_indices": (1, 2, 3, 4)}

DETECTOR = """
_base_ = ["{base}"]
model = dict(
    backbone=dict(name="resnet10t", out_indices=(1, 2, 3, 4)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""


@pytest.fixture(scope="session", autouse=True)
def quiet_loggers():
    """mmengine's logger keeps the standard error of the command that made it, which is closed by the next one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "raiseExceptions", False)
        yield


@pytest.fixture(scope="session")
def run():
    """Run the command in this process: `run("list", "--family", "dinat")`."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture(scope="session")
def refused(run):
    """Run the command and make sure that it says one line about the user's mistake: exit code 2, no traceback."""

    def invoke(*arguments: object) -> str:
        result = run(*arguments)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 2, result.output
        assert_one_line(result.stderr)
        return result.stderr

    return invoke


@pytest.fixture(scope="session")
def shell():
    """Run the command in a process of its own, as a user does."""

    def invoke(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        code = "from terrazzo.tools.cli import main; main()"
        return run_code(code, *arguments, env={**os.environ, **environment})

    return invoke


@pytest.fixture(scope="session")
def config_on():
    """A packaged config on a folder of data; it is read once for each set of options."""
    from terrazzo.openmmlab.config import load_config, set_data_root

    read = {}

    def invoke(config: str, root: Path, options: dict):
        key = (config, repr(options))
        if key not in read:
            read[key] = load_config(config, options=options)
        cfg = copy.deepcopy(read[key])
        set_data_root(cfg, str(root))
        return cfg

    return invoke


@pytest.fixture
def check(config_on, capsys):
    """Check splits of a packaged config on a folder; the words of the refusal, or what was said besides."""
    from terrazzo.errors import InputError
    from terrazzo.tools.data.checks import check_data

    def invoke(config: str, root: Path, *splits: str, **options) -> str:
        try:
            cfg = config_on(config, root, options)
            capsys.readouterr()  # mmengine says that another config's scope was there before
            check_data(cfg, splits)
            said = capsys.readouterr().err
        except InputError as error:
            said = f"refused: {error}\n"
        assert said.count("\n") == bool(said)  # one line, or none
        return said

    return invoke


def assert_one_line(stderr: str) -> None:
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr


@pytest.fixture(scope="session")
def floors(tmp_path_factory) -> Path:
    """Tiny floors: 6 to train on, 3 to evaluate on, 64 pixels a side."""
    return write_floors(tmp_path_factory.mktemp("data") / "floors", train=6, val=3, size=64, seed=3)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, floors) -> tuple[Path, Path]:
    """A segmentation config, written out in full, and a checkpoint of it after two iterations."""
    from terrazzo.openmmlab.config import build_runner, load_config
    from terrazzo.tools import mm

    options = {
        **BACKBONE,
        "train_dataloader.batch_size": 2,
        "model.data_preprocessor.size": (64, 64),
        "crop_size": (64, 64),
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
    }
    cfg = load_config("fpn_dinat-mini_floors", floors, options)
    work_dir = tmp_path_factory.mktemp("trained")
    with mm.quiet():
        build_runner(cfg, work_dir, seed=0).train()
    return work_dir / "fpn_dinat-mini_floors.py", work_dir / "iter_2.pth"


@pytest.fixture
def picture(tmp_path) -> Path:
    """A picture that is neither square nor of even size."""
    path = tmp_path / "floor.png"
    Image.fromarray(FloorMaker(seed=1, size=96).make().image).crop((0, 0, 91, 67)).save(path)
    return path


@pytest.fixture(params=["missing", "empty", "corrupt", "truncated", "unsupported", "zero pixels"])
def bad_picture(request, tmp_path) -> Path:
    """A picture that cannot be used, in each of the ways that pictures go bad."""
    path = tmp_path / f"bad{'.svg' if request.param == 'unsupported' else '.png'}"
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    whole.unlink()
    contents = {
        "empty": b"",
        "corrupt": bytes(reversed(data)),
        "truncated": data[: len(data) // 2],
        "unsupported": b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'/>",
        # A header that promises a picture of no height.
        "zero pixels": data[:20] + b"\0\0\0\0" + data[24:],
    }
    if request.param in contents:
        path.write_bytes(contents[request.param])
    return path


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A Mask R-CNN with random weights: a config, and a checkpoint of it."""
    from mmengine.registry import MODELS

    from terrazzo.openmmlab.config import load_config, packaged_configs

    folder = tmp_path_factory.mktemp("detector")
    base = packaged_configs()["mask-rcnn_dinat-mini_fpn_1xb2-36e_nuclei-768x768"]
    config, checkpoint = folder / "detector.py", folder / "detector.pth"
    config.write_text(DETECTOR.format(base=base))
    torch.manual_seed(0)
    model = MODELS.build(load_config(config).model)
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": ("chip",)}}}, checkpoint)
    return config, checkpoint

"""`terrazzo compare`: it trains runs, compares them, and continues after an interruption."""

import json

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from terrazzo.tools import results
from terrazzo.tools.cli import cli
from terrazzo.tools.training.comparison import draw

CONFIG = "fpn_dinat-mini_floors"
SMALLER = "dinat_mini,kernel_size=3,drop_rate=0.1"  # with smaller bias tables


def compare(floors, out, *more):
    options = ["train_dataloader.batch_size=2", "default_hooks.logger.interval=1"]
    arguments = ["compare", CONFIG, "--data-root", floors, "--out", out, "--max-iters", 2]
    arguments += ["--backbone", "resnet18", "--backbone", SMALLER, *more, "--cfg-options", *options]
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.mark.long
def test_compare(floors, tmp_path):
    done = compare(floors, tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = results.read(tmp_path / "out" / "training.csv")
    found = {(row.variant, row.metric): row for row in rows}
    for name, folder in (("resnet18", "resnet18-0"), (SMALLER, "dinat_mini-kernel_size-3-drop_rate-0.1-0")):
        assert 0 <= found[name, "mIoU"].p50 <= 100
        assert 0 < found[name, "loss"].p50 < 5
        assert "2 iterations of batch 2, from scratch, 1 seed" in found[name, "mIoU"].backend
        final = json.loads((tmp_path / "out" / folder / "final.json").read_text())
        assert [step for step, _ in final["losses"]] == [1, 2]
    with torch.device("meta"):
        wanted = timm.create_model("dinat_mini", features_only=True, kernel_size=3, norm_outputs=True)
    assert found[SMALLER, "backbone parameters"].p50 == sum(x.numel() for x in wanted.parameters())
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    # Finished runs are not run again.
    (tmp_path / "out" / "resnet18-0" / "iter_2.pth").unlink()
    again = compare(floors, tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "out" / "resnet18-0" / "iter_2.pth").exists()
    assert results.read(tmp_path / "out" / "training.csv") == rows
    # A run without a logged loss has the other figures.
    for path in (tmp_path / "out").glob("*/final.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"losses": []}))
    assert compare(floors, tmp_path / "out").exit_code == 0
    assert results.read(tmp_path / "out" / "training.csv") == [row for row in rows if row.metric != "loss"]


def test_one_loss_is_seen(tmp_path):
    """If a run is as short as the log's interval, its single loss is drawn."""
    draw({"resnet18": [{"losses": [(5, 1.8)]}]}, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), int)
    pixels = pixels[:, : pixels.shape[1] * 2 // 3]  # the legend is in the upper right corner
    assert (np.abs(pixels - (31, 119, 180)).max(-1) < 30).sum() > 10, "nothing is drawn in the first colour"


@pytest.mark.long
def test_compare_refuses_unknown_backbones_and_arguments(floors, tmp_path):
    assert "unexpected" in compare(floors, tmp_path / "out", "--backbone", "dinat_mini,colour=3").output
    done = compare(floors, tmp_path / "out", "--backbone", "resnet19")
    assert done.exit_code == 2
    assert "resnet19" in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()

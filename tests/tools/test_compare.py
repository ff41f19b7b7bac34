"""`terrazzo compare`: runs side by side, gone on with after an interruption."""

import json

from click.testing import CliRunner

from terrazzo.tools import results
from terrazzo.tools.cli import cli

CONFIG = "fpn_dinat-mini_floors"


def compare(floors, out, *more):
    options = ["train_dataloader.batch_size=2", "default_hooks.logger.interval=1"]
    arguments = ["compare", CONFIG, "--data-root", floors, "--out", out, "--max-iters", 2]
    arguments += ["--backbone", "resnet18", "--backbone", "dinat_mini", *more, "--cfg-options", *options]
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_compare(floors, tmp_path):
    done = compare(floors, tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = results.read(tmp_path / "out" / "training.csv")
    found = {(row.variant, row.metric): row for row in rows}
    for name in ("resnet18", "dinat_mini"):
        assert 0 <= found[name, "mIoU"].p50 <= 100
        assert 0 < found[name, "loss"].p50 < 5
        assert "2 iterations of batch 2, from scratch, 1 seed" in found[name, "mIoU"].backend
        final = json.loads((tmp_path / "out" / f"{name}-0" / "final.json").read_text())
        assert [step for step, _ in final["losses"]] == [1, 2]
    assert found["resnet18", "backbone parameters"].p50 < found["dinat_mini", "backbone parameters"].p50
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    # What has ended is not run again.
    (tmp_path / "out" / "resnet18-0" / "iter_2.pth").unlink()
    again = compare(floors, tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "out" / "resnet18-0" / "iter_2.pth").exists()
    assert results.read(tmp_path / "out" / "training.csv") == rows


def test_compare_one_model_with_two_settings(floors, tmp_path):
    out = tmp_path / "out"
    more = ["--backbone", "dinat_mini,kernel_size=3,drop_rate=0.1", "--max-iters", 1]
    done = compare(floors, out, *more)
    assert done.exit_code == 0, done.output
    rows = {row.variant: row.p50 for row in results.read(out / "training.csv") if row.metric == "backbone parameters"}
    assert rows[more[1]] < rows["dinat_mini"]  # smaller tables of positions
    assert "unexpected" in compare(floors, tmp_path / "none", "--backbone", "dinat_mini,colour=3").output


def test_compare_refuses_an_unknown_backbone(floors, tmp_path):
    done = compare(floors, tmp_path / "out", "--backbone", "resnet19")
    assert done.exit_code == 2
    assert "resnet19" in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()

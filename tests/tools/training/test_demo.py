"""`terrazzo demo`, small: a small backbone, few floors, a few iterations."""

import json

import pytest
from PIL import Image

from terrazzo.tools.data.floors import write_floors
from terrazzo.tools.training import demo

SHORT = {
    "model.backbone.name": "resnet10t",
    "model.backbone.out_indices": (1, 2, 3, 4),
    "train_cfg.max_iters": 3,
    "train_cfg.val_interval": 3,
    "train_dataloader.batch_size": 2,
}


@pytest.fixture
def small(monkeypatch):
    """Let the command run the demo on few floors for a few iterations."""
    whole = demo.run_demo
    monkeypatch.setattr(
        "terrazzo.tools.verbs.demo.run_demo", lambda out, seed: whole(out, seed, train=4, val=2, options=SHORT)
    )


@pytest.mark.long
def test_small_demo(run, small, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--seed", 1)
    # Three iterations teach little: everything runs, and the verdict says that it is not good enough.
    assert result.exit_code == 1, result.output
    assert "below 4 times" in result.stderr
    assert "Traceback" not in result.stderr
    record = json.loads((out / "results.json").read_text())
    assert record["onnx_relative_error"] < 1e-4
    assert 0 <= record["miou"] <= 100
    assert set(record["seconds"]) == {"make floors", "train", "evaluate", "draw", "export"}
    assert Image.open(out / "predictions.png").width > 3 * 256
    assert (out / f"{demo.CONFIG}.onnx").is_file()
    for words in ("mIoU", "constant prediction", "relative error", "predictions.png"):
        assert words in result.stdout
    (out / "leftover.txt").write_text("of an earlier run")
    demo._clear(out)
    assert [path.name for path in out.iterdir()] == [demo.MARKER]


def test_refuses_foreign_folders_and_files(refused, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose this")
    assert "was not made by a demo" in refused("demo", "--out", tmp_path)
    assert "is a file" in refused("demo", "--out", tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "do not lose this"


def test_constant_miou(tmp_path):
    """One class is right on its share of the pixels and the others never; the mean is over the classes that occur."""
    import numpy as np

    root = write_floors(tmp_path, train=2, val=1, size=48, seed=0)
    labels = np.asarray(Image.open(root / "labels" / "val" / "floor_0000.png"))
    train = np.concatenate([np.asarray(Image.open(path)).ravel() for path in (root / "labels" / "train").iterdir()])
    common = np.bincount(train).argmax()
    expected = 100 * (labels == common).mean() / len(np.unique(labels))
    assert demo.constant_miou(root) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("miou", "exported", "passed"), [(40.0, True, True), (31.9, True, False), (40.0, False, False)]
)
def test_verdict(miou, exported, passed):
    assert demo.Outcome(miou, 8.0, 1e-6, exported, {}, {}).passed is passed

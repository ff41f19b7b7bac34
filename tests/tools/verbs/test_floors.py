"""`terrazzo floors`: data that the packaged config reads, from one command."""

import json

import pytest

from terrazzo.tools.data import floors


@pytest.mark.long
def test_the_packaged_config_reads_them(run, check, tmp_path):
    root = tmp_path / "data" / "floors"
    result = run("floors", root, "--train", 2, "--val", 1, "--size", 48, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert "wrote 2 floors to train on and 1 to evaluate on" in result.stdout
    assert check("fpn_dinat-mini_floors", root, "train", "val") == ""
    assert len(json.loads((root / "annotations" / "instances_train.json").read_text())["images"]) == 2
    assert sorted(path.name for path in root.parent.iterdir()) == ["floors"]
    again = tmp_path / "again"
    again.mkdir()
    floors.write_floors(again, 2, 1, 48, 5)
    for path in again.rglob("*.*"):
        assert path.read_bytes() == (root / path.relative_to(again)).read_bytes()
    assert (root.stat().st_mode & 0o777) == (again.stat().st_mode & 0o777)


def test_refusals_write_nothing(refused, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").write_text("do not lose this")
    assert "is not empty; name a new folder" in refused("floors", tmp_path / "kept")
    assert "is a file" in refused("floors", tmp_path / "kept" / "thesis.tex")
    assert "--size" in refused("floors", tmp_path / "new", "--size", 8)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "thesis.tex"]


def test_an_interrupted_command_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(root, *settings):
        (root / "half").mkdir()
        raise OSError(28, "No space left on device", str(root))

    monkeypatch.setattr(floors, "write_floors", fail)
    result = run("floors", tmp_path / "new")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert not list(tmp_path.iterdir())

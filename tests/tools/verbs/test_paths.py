"""`terrazzo paths`: images of paths in folders that the house's tools read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools.data import floors
from terrazzo.tools.data.paths import folders, paths
from terrazzo.tools.data.paths.folders import Asked, kept_paths, read_dense, read_pairs


def test_the_dense_form(run, tmp_path):
    root = tmp_path / "data" / "paths-64"
    done = run("paths", root, "--size", 64, "--train", 2, "--val", 1, "--contour", 6, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "wrote 2 images to train on and 1 to evaluate on" in done.stdout
    images, labels, instances = read_dense(root, "train")
    for index, image in enumerate(paths(64, 2, 6, 3, dense=True)):
        assert np.array_equal(images[index], image.image)
        assert np.array_equal(labels[index], image.classes)
        assert np.array_equal(instances[index], image.instances)
    validation = next(paths(64, 1, 6, 3, dense=True, split=1))
    assert np.array_equal(read_dense(root, "val")[0][0], validation.image)
    assert json.loads((root / "classes.json").read_text())["classes"] == ["background", "path", "other"]
    lines = (root / "paths.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines[1:]] == [
        ["train", "path_000000.png", "1"],
        ["train", "path_000001.png", "1"],
        ["val", "path_000000.png", "1"],
    ]


def test_pairs_are_kept(run, tmp_path):
    root = tmp_path / "paths-32"
    asked = Asked(32, False, {"train": 5, "test": 2}, contour=6)
    assert kept_paths(root, asked) == root
    images, labels = read_pairs(root, "train")
    made = list(paths(32, 5, 6))
    assert np.array_equal(labels, [image.label for image in made])
    assert np.array_equal(images, [image.image for image in made])
    written = next(root.glob("train/same/*.png"))
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(written)
    assert kept_paths(root, asked) == root
    assert not np.asarray(Image.open(written)).any(), "a folder that fits is not written again"
    with pytest.raises(InputError, match="contour 6 and not 9; name another folder"):
        kept_paths(root, Asked(32, False, {"train": 5, "test": 2}, contour=9))
    with pytest.raises(InputError, match="holds no path images"):
        kept_paths(tmp_path, asked)
    (tmp_path / "paths.json").write_text("[32]")
    with pytest.raises(InputError, match="holds no path images"):
        kept_paths(tmp_path, asked)
    again = tmp_path / "again"
    assert run("paths", again, "--form", "pairs", "--size", 32, "--train", 5, "--val", 2, "--contour", 6).exit_code == 0
    assert (again / "paths.csv").read_bytes() == (root / "paths.csv").read_bytes()


@pytest.mark.parametrize(("dense", "kind"), [(False, "train/different and train/same"), (True, "labels/train")])
def test_lost_pictures_are_missed(tmp_path, dense, kind):
    root = tmp_path / "empty"
    root.mkdir()
    asked = Asked(64, dense, {"train": 3, "val": 1}, contour=6)
    assert kept_paths(root, asked) == root, "an empty folder is as good as none"
    *_, last = kind.split(" and ")
    for name in (".DS_Store", "._path_000000.png"):
        (root / last / name).write_bytes(b"of the system")
    assert kept_paths(root, asked) == root
    read = read_dense if dense else read_pairs
    assert all(len(part) == 3 for part in read(root, "train"))
    (written, *_) = (path for folder in kind.split(" and ") for path in (root / folder).glob("path_*.png"))
    written.unlink()
    with pytest.raises(InputError, match=f"{root} has 2 of 3 images in {kind}; remove it"):
        kept_paths(root, asked)


@pytest.mark.parametrize("verb", ["paths", "floors"])
def test_folders_that_cannot_be_replaced(refused, tmp_path, monkeypatch, verb):
    """They are refused before any image is made."""
    monkeypatch.setattr(folders, "write_paths", None)
    monkeypatch.setattr(floors, "write_floors", None)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in (".", here):
        assert f"{name} is the current folder, which cannot be replaced" in refused(verb, name)
    (tmp_path / "other").mkdir()
    for target in ("other", "absent"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        assert "link is a link; name the folder itself" in refused(verb, tmp_path / "link")
        (tmp_path / "link").unlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "other")
    assert "other is a mount point, which cannot be replaced" in refused(verb, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "other"]


def test_refusals_write_nothing(refused, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").write_text("do not lose this")
    assert "is not empty; name a new folder" in refused("paths", tmp_path / "kept")
    assert "pixels a side, got 48" in refused("paths", tmp_path / "new", "--size", 48)
    assert "is a file" in refused("paths", tmp_path / "kept" / "thesis.tex")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "thesis.tex"]

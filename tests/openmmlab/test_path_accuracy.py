"""PathAccuracy on images of the generator, and in a config's evaluation."""

import numpy as np
import pytest
import torch
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.openmmlab.path_accuracy import PathAccuracy
from terrazzo.tools.data.paths import paths
from terrazzo.tools.data.paths.folders import Asked, read_dense, write_paths

COUNT = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("paths")
    write_paths(root, Asked(64, True, {"train": 1, "val": COUNT}, contour=6))
    return root


def score(root, predictions, labels=None):
    metric = PathAccuracy()
    labels = read_dense(root, "val")[1] if labels is None else labels
    for index, found in enumerate(predictions):
        of = {"pred_sem_seg": found, "gt_sem_seg": labels[index]}
        sample = {key: {"data": torch.as_tensor(value.astype(np.int64))[None]} for key, value in of.items()}
        metric.process({}, [sample | {"seg_map_path": str(root / "labels" / "val" / f"path_{index:06d}.png")}])
    return metric.evaluate(COUNT)


def test_scores(root):
    made = list(paths(64, COUNT, 6, dense=True, split=1))
    assert score(root, [image.classes for image in made]) == {"paths/accuracy": 100, "paths/IoU": 100}
    other = [image.instances == 3 - image.marked for image in made]
    assert score(root, other) == {"paths/accuracy": 0, "paths/IoU": 0}
    for undecided in (0, 1):
        constant = [np.full_like(image.classes, undecided) for image in made]
        assert score(root, constant)["paths/accuracy"] == 50
    # Always the same contour, whichever is marked.
    share = np.mean([image.marked == 1 for image in made])
    found = score(root, [image.instances == 1 for image in made])
    assert found["paths/accuracy"] == pytest.approx(100 * share)
    # More pixels of the path than of the other contour, and less.
    stripes = np.arange(64 * 64).reshape(64, 64) % 3 > 0
    mixed = [np.where(image.path, stripes, (image.instances > 0) & ~stripes) for image in made]
    assert score(root, mixed)["paths/accuracy"] == 100
    assert score(root, [~part & (image.instances > 0) for image, part in zip(made, mixed)])["paths/accuracy"] == 0


def test_data_without_instances_are_refused(root, tmp_path):
    write_paths(tmp_path, Asked(64, True, {"train": 1, "val": 1}, contour=6))
    labels = read_dense(tmp_path, "val")[1]
    file = tmp_path / "instances" / "val" / "path_000000.png"
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(file)
    with pytest.raises(InputError, match="does not mark one of two long contours"):
        score(tmp_path, labels, labels)
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(file)
    with pytest.raises(InputError, match="has the size"):
        score(tmp_path, labels, labels)
    file.unlink()
    with pytest.raises(InputError, match="there is no instance map"):
        score(tmp_path, labels, labels)

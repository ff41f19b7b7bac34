"""Repairs of other packages: each acts when its package is imported, in memory, and only where there is need of it."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest

from terrazzo.openmmlab.repairs import REPAIRS, Repair
from terrazzo.openmmlab.repairs._finder import RepairFinder, edited
from terrazzo.openmmlab.repairs.modelindex import load
from terrazzo.openmmlab.repairs.xtcocotools import COCO, PARTS, COCOeval


class TestFinder:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A package that asserts a version and imports a module that does not exist, with its repair at work."""
        folder = tmp_path / "old_package"
        folder.mkdir()
        (folder / "__init__.py").write_text("newest = '1.0'\nassert newest >= '2.0'\n")
        (folder / "fine.py").write_text("from missing_module.inner import sqrt\n")
        (tmp_path / "present_module.py").write_text("mine = True\n")
        repair = Repair(
            edits={"old_package": {"newest = '1.0'": "newest = '2.0'"}, "old_package.fine": {"no such text": "x"}},
            stand_ins={"missing_module": "", "missing_module.inner": "math", "present_module": "math"},
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "meta_path", [RepairFinder({"old_package": repair}), *sys.meta_path])
        yield folder
        for name in list(sys.modules):
            if name.split(".")[0] in ("old_package", "missing_module", "present_module"):
                del sys.modules[name]

    def test_edits_in_memory(self, package):
        before = (package / "__init__.py").read_text()
        module = importlib.import_module("old_package")
        assert module.newest == "2.0"
        assert module.__spec__.origin == module.__file__ == str(package / "__init__.py")
        assert (package / "__init__.py").read_text() == before
        assert not list(package.rglob("__init__*.pyc")), "byte code would keep the repair"

    def test_a_module_without_the_text_is_untouched(self, package):
        spec = importlib.util.find_spec("old_package.fine")
        assert type(spec.loader) is importlib.machinery.SourceFileLoader

    def test_stand_ins_exist_with_their_package_only(self, package):
        assert importlib.util.find_spec("missing_module") is None
        importlib.import_module("old_package.fine")
        assert importlib.import_module("old_package.fine").sqrt(4) == 2
        assert importlib.util.find_spec("missing_module").submodule_search_locations is not None

    def test_installed_modules_are_preferred(self, package):
        importlib.import_module("old_package")
        assert importlib.import_module("present_module").mine


@pytest.mark.parametrize("package", REPAIRS)
def test_every_repair_is_needed(package):
    """A repair that does nothing any more should leave the table."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; docs/openmmlab.md has the command that installs it")
    for name, edits in REPAIRS[package].edits.items():
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        parts = name.split(".")[1:]
        path = next(path for path in _files(folder, parts) if path.is_file())
        assert edited(path.read_text(), edits) != path.read_text(), name


def _files(folder, parts):
    from pathlib import Path

    stem = Path(folder).joinpath(*parts)
    return stem.with_suffix(".py"), stem / "__init__.py"


@pytest.fixture
def people():
    """Three people with body, foot, face and hand keypoints in two pictures, and slightly wrong results."""
    random = np.random.default_rng(0)
    counts = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 8, "lefthand_kpts": 5, "righthand_kpts": 5}
    truths, results = [], []
    for number, (image, size) in enumerate([(1, 200), (1, 60), (2, 60)]):
        truth = {"id": number, "image_id": image, "category_id": 1, "bbox": [10.0, 20.0, size, size]}
        truth |= {"area": 0.6 * size**2, "num_keypoints": 17}
        result = {"image_id": image, "category_id": 1, "score": 0.9 - number / 10}
        for key, count in counts.items():
            points = random.uniform(20, size, (count, 3))
            points[:, 2] = 2
            truth[key] = points.ravel().tolist()
            points[:, :2] += random.normal(0, 0.01 * size, (count, 2))
            points[:, 2] = 1
            result[key] = points.ravel().tolist()
        truths.append(truth)
        results.append(result)
    coco = COCO()
    images = [{"id": 1, "crowdIndex": 0.1}, {"id": 2, "crowdIndex": 0.9}]
    coco.dataset = {"images": images, "annotations": truths, "categories": [{"id": 1, "name": "person"}]}
    coco.createIndex()
    return coco, results, counts


class TestKeypointScores:
    def test_of_coco_are_pycocotools(self, people):
        import pycocotools.cocoeval

        coco, results, _ = people
        for annotation in coco.dataset["annotations"]:
            annotation["id"] += 1  # pycocotools takes 0 for "no match"
        coco.createIndex()
        stats = []
        for evaluate in (COCOeval, pycocotools.cocoeval.COCOeval):
            scores = evaluate(coco, coco.loadRes(results), "keypoints")
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            stats.append(scores.stats)
        np.testing.assert_array_equal(*stats)
        assert 0 < stats[0][0] <= 1

    @pytest.mark.parametrize("kind", PARTS)
    def test_of_parts_with_other_sigmas(self, people, kind):
        coco, results, counts = people
        number = sum(counts[key] for key in PARTS[kind])
        found = []
        for area in (True, False):
            scores = COCOeval(coco, coco.loadRes(results), kind, np.full(number, 0.05), use_area=area)
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            assert len(scores.stats) == (9 if kind == "keypoints_crowd" else 10)
            assert 0.3 < scores.stats[0] <= 1
            found.append(np.concatenate([values for values in scores.ious.values() if len(values)], axis=None))
        assert (found[0] > found[1]).any(), "a smaller area makes the same distance count more"

    def test_of_nothing(self, people):
        coco = people[0]
        assert coco.loadRes([]).anns == {}


def test_model_descriptions(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "model-index.yml").write_text("Import:\n  - net/metafile.yml\n")
    (tmp_path / "net" / "metafile.yml").write_text(
        "Models:\n  - Name: Net_A\n    In Collection: Net\n    Config: configs/a.py\n    Weights: https://x/a.pth\n"
        "    Results:\n      - Task: Image Classification\n        Dataset: d\n  - Name: B\n    Results: null\n"
    )
    index = load(str(tmp_path / "model-index.yml"))
    index.build_models_with_collections()
    first, second = index.models
    assert (first.name, first.config, first.weights, first.in_collection) == (
        *("Net_A", "configs/a.py", "https://x/a.pth", "Net"),
    )
    assert first.results[0].task == "Image Classification"
    assert first.filepath == str(tmp_path / "net" / "metafile.yml")
    assert second.results is second.config is None

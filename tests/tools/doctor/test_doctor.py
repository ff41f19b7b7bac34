"""`terrazzo doctor openmmlab`: what became of each config, how it is counted, and with which exit code."""

import csv
import importlib.metadata
import importlib.util
import os

import pytest
import torch

from terrazzo.errors import install_command
from terrazzo.tools import results
from terrazzo.tools.doctor import openmmlab as doctor_openmmlab
from terrazzo.tools.doctor.openmmlab import DISTRIBUTIONS, FAULTS, Worker
from terrazzo.tools.doctor.unfilled import Unfilled
from terrazzo.tools.reports import zoo as zoo_results
from terrazzo.tools.reports.zoo import (
    BUILT,
    FAILED,
    FAULTY,
    LACKS,
    MODELS,
    NEEDS,
    NO_MODEL,
    STATUSES,
    Examined,
    Finding,
)

HEAD = 'default_scope = "mmdet"\n'
RETINANET = """
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py"]
"""
IMPORTING = """
raise ImportError('Please run {}')
"""
CONFIGS = {
    "whole.py": HEAD + RETINANET,
    "same-model.py": HEAD + RETINANET + "max_epochs = 3\n",
    "lacking.py": """
custom_imports = dict(imports=["mmcv.ops", "mmdet.models"])
default_scope = "mmdet"
model = dict(type="SparseConv2d", in_channels=2, out_channels=2, kernel_size=3)
""",
    "needing.py": 'default_scope = "mmdet"\nmodel = dict(type="mmpretrain.ImageClassifier")\n',
    "inner/importing.py": 'custom_imports = dict(imports=["no_such_package.models"])\nmodel = dict(type="X")\n',
    "inner/broken.py": HEAD + RETINANET + 'model = dict(backbone=dict(depth="many"))\n',
    "inner/no-python.py": "model = dict(\n",
    "leaving.py": "import sys\nsys.exit(3)\n",
    "dying.py": 'custom_imports = dict(imports=["dies_at_import"])\nmodel = dict(type="X")\n',
    "part.py": "data_root = 'data'\n",
    "quoted.py": IMPORTING.format('pip install "no-such-package>=2,<3" to do this'),
    "too-new.py": IMPORTING.format('`pip install "timm<0.5"` to do this'),
    "from-git.py": IMPORTING.format("pip install git+https://example.org/people/No-Such-Clip.git"),
    "_base_/ignored.py": "model = dict(\n",
    "_base_ignored.py": "model = dict(\n",
}


@pytest.fixture(scope="module")
def examined(tmp_path_factory, run):
    """The command's result on a folder of configs that end in every way, and the rows that it wrote."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, text in CONFIGS.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = folder / "modules"
    modules.mkdir()
    (modules / "dies_at_import.py").write_text("import os\nos._exit(9)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)  # a spawned process is given this one's sys.path
        result = run("doctor", "openmmlab", "--configs", folder / "configs", "--out", folder / "out.csv")
    with open(folder / "out.csv", newline="") as file:
        rows = {row["config"]: row for row in csv.DictReader(file)}
    return result, rows


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "status", "reason"),
    [
        ("whole.py", BUILT, ""),
        ("same-model.py", BUILT, ""),
        ("lacking.py", LACKS, "fused_indice_conv_forward"),
        ("needing.py", NEEDS, "mmpretrain"),
        ("inner/importing.py", NEEDS, "no_such_package"),
        ("inner/broken.py", FAILED, "KeyError: 'invalid depth many for resnet'"),
        ("inner/no-python.py", FAILED, "SyntaxError"),
        ("leaving.py", FAILED, "SystemExit: 3"),
        ("dying.py", FAILED, "the interpreter crashed"),
        ("part.py", NO_MODEL, ""),
        ("quoted.py", NEEDS, "no-such-package>=2,<3"),
        ("too-new.py", NEEDS, "timm<0.5"),
        ("from-git.py", NEEDS, "no-such-clip"),
    ],
)
def test_every_way_to_end(examined, config, status, reason):
    row = examined[1][config]
    assert row["status"] == status, row
    assert row["reason"].startswith(reason) if reason else row["reason"] == ""


def test_report(examined):
    result, rows = examined
    assert result.exit_code == 1
    assert set(rows) == set(CONFIGS) - {"_base_/ignored.py", "_base_ignored.py"}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["configs", "12", "4", "2", "5", "1", "0", "4"] in lines, result.stdout
    assert (
        "Packages needed: mmpretrain (1), no-such-clip (1), no-such-package>=2,<3 (1), no_such_package (1)"
        in result.stdout
    )
    assert "mmcv operators provided" in result.stdout
    assert "nms" in result.stdout


@pytest.mark.long
def test_a_part_of_the_zoo(run):
    result = run("doctor", "openmmlab", "--package", "mmseg", "--only", "*/fcn_hr18s_4xb4-80k_*")
    assert result.exit_code == 0, result.output
    assert "failed" in result.stdout
    assert "mmdet" not in result.stdout.split("Counted")[0]


def test_missing_package(refused, monkeypatch):
    monkeypatch.setattr(doctor_openmmlab, "DISTRIBUTIONS", {"mmseg": "mmsegmentation"})
    monkeypatch.setattr(doctor_openmmlab.importlib.util, "find_spec", lambda name: None)
    assert install_command("openmmlab") in refused("doctor", "openmmlab")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name what to examine: openmmlab"),
        (("timm",), "the doctor knows no 'timm'; name one of: openmmlab"),
        (("openmmlab", "--package", "mmrotate"), "mmrotate"),
        (("openmmlab", "--only", "no-such-*"), "matches 'no-such-*'"),
        (("openmmlab", "--configs", "/no/such/folder"), "/no/such/folder"),
        (("openmmlab", "--configs", "/tmp", "--package", "mmdet"), "give one of them"),
        (("openmmlab", "--out", "/no/such/folder/out.csv"), "is not a folder"),
        (("openmmlab", "--only", "yolox/*", "--results", "/tmp"), "leave out"),
    ],
)
def test_wrong_usage(refused, arguments, words):
    assert words in refused("doctor", *arguments)


def test_help(run):
    assert "openmmlab" in run("doctor", "--help").output
    assert "--only" in run("doctor", "openmmlab", "--help").output


def test_faults_are_of_configs_that_exist():
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    assert ("mmdet", installed["mmdet"]) in FAULTS
    for (package, release), faults in FAULTS.items():
        if installed.get(DISTRIBUTIONS[package]) == release:
            folder = doctor_openmmlab._folders(package, None)[package]
            assert all((folder / config).is_file() for config in faults)


def test_only_that_release_is_excused(monkeypatch):
    (package, _), faults = next(iter(FAULTS.items()))
    config = next(iter(faults))
    assert doctor_openmmlab._fault(package, config).status == FAULTY
    assert doctor_openmmlab._fault(package, "yolox/other.py") is None
    assert doctor_openmmlab._fault("mine", config) is None
    monkeypatch.setattr(doctor_openmmlab.importlib.metadata, "version", lambda name: "99.0")
    assert doctor_openmmlab._fault(package, config) is None


def test_counts():
    rows = zoo_results.count(
        [
            Examined("mmdet", "a.py", Finding(BUILT), "1"),
            Examined("mmdet", "b.py", Finding(BUILT), "1"),
            Examined("mmdet", "c.py", Finding(LACKS, "nms, roi_pool"), "2"),
            Examined("mmdet", "d.py", Finding(NO_MODEL), ""),
        ]
    )
    counts = {row.metric: row.p50 for row in rows}
    assert {name: counts[name] for name in (BUILT, LACKS, NO_MODEL, MODELS)} == {
        BUILT: 2,
        LACKS: 1,
        NO_MODEL: 1,
        MODELS: 2,
    }
    assert counts["lacks nms"] == counts["lacks roi_pool"] == 1
    head, (line,) = zoo_results.table(rows)
    assert dict(zip(head, line))["configs"] == "3"
    assert "Operators lacking: nms (1), roi_pool (1)." in zoo_results.notes(rows)


def test_stored_counts_are_of_a_whole_zoo_and_of_these_releases():
    rows = results.read(zoo_results.PATH)
    for package, distribution in DISTRIBUTIONS.items():
        if importlib.util.find_spec(package) is None or package not in {row.variant for row in rows}:
            continue
        counts = {row.metric: row.p50 for row in rows if row.variant == package}
        folder = doctor_openmmlab._folders(package, None)[package]
        paths = doctor_openmmlab._selected({package: folder}, None)
        version = f"{distribution} {importlib.metadata.version(distribution)}"
        if version in next(row.versions for row in rows if row.variant == package):
            assert sum(counts[status] for status in STATUSES) == len(paths)


def test_a_process_that_dies_is_replaced():
    worker = Worker(dict)
    try:
        assert worker.call(min, 1, 2) == 1
        assert worker.call(_die) is None
        assert worker.call(max, 1, 2) == 2
    finally:
        worker.close()


def _die():
    os._exit(9)


def test_unfilled_weights_have_shapes_and_nothing_else():
    with Unfilled():
        layer = torch.nn.Linear(1 << 14, 1 << 15)  # 2 GiB, were it filled
        drawn = torch.randn(2, 3, generator=torch.Generator())
    assert layer.weight.shape == (1 << 15, 1 << 14)
    assert drawn.shape == (2, 3)
    assert torch.nn.Linear(4, 4).weight.abs().sum() > 0, "outside of the context weights are filled"


def test_models_that_ask_for_weights_and_for_the_scope_of_an_absent_package(tmp_path):
    from terrazzo.tools.doctor import zoo

    with pytest.raises(zoo.NotLoaded) as asked:
        zoo.NoWeights(state_dict=zoo.NoWeights())["state_dict"]["conv1.weight"]
    closed = zoo.NetworkClosed("no network")
    for error in (asked.value, closed, AssertionError("backbone. is not in the pretrained model")):
        assert zoo.explain(error) == Finding(NEEDS, zoo.WEIGHTS)
    assert zoo.explain(KeyError("conv1.weight")).status == FAILED
    config = tmp_path / "scoped.py"
    config.write_text('model = dict(_scope_="no_such_scope", type="Teacher")\n')
    assert zoo.examine(config) == Finding(NEEDS, "no_such_scope")

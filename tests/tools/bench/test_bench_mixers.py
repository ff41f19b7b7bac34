"""`terrazzo bench mixers` measures each mechanism beside the dense model."""

import shutil

import numpy as np
import pytest
from PIL import Image

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.mechanisms import ATTENTION, DENSITY, MAP, MASS, MEMORY, MIXING, gain_of, table
from terrazzo.tools.bench.pareto import front
from terrazzo.tools.inspect.timing import FORWARD

MODEL = "test_vit"
LLSA = "llsa,level=1,topk=1,edge=2,part=None,dense_up_to=0"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (67, 91, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def measured(run, tmp_path, picture):
    """The rows and the output of a run at two sizes."""
    out, drawn = tmp_path / "rows.csv", tmp_path / "pareto.png"
    mechanisms = ("--mixer", "hedgehog", "--mixer", LLSA, "--reduce", "mctf,r=4")
    sizes = ("--size", 64, 96, "--size", 96, 96)
    options = ("--pictures", picture, "--seconds", 0.01, "--device", "cpu", "--out", out, "--picture", drawn)
    done = run("bench", "mixers", MODEL, *mechanisms, *sizes, *options)
    assert done.exit_code == 0, done.output
    assert Image.open(drawn).width > 500
    return results.read(out), done.output


@pytest.mark.long
def test_rows(measured):
    rows, output = measured
    found = {(row.shape, row.backend, row.metric): row.p50 for row in rows}
    for shape in ("1x3x64x96", "1x3x96x96"):
        for name in ("dense", "hedgehog", LLSA, "mctf,r=4"):
            assert 0 < found[shape, name, MIXING] < found[shape, name, ATTENTION] < found[shape, name, FORWARD]
            assert -1 <= found[shape, name, MAP] <= 1 + 1e-5
            assert found.get((shape, name, MEMORY), 0) >= 0
            assert name in output
        assert found[shape, "dense", MAP] == pytest.approx(1, abs=1e-5)
        assert 0 < found[shape, LLSA, DENSITY] < 1
        assert 0 < found[shape, LLSA, MASS] < 1
        assert (shape, "hedgehog", DENSITY) not in found
        assert gain_of(found, shape, "dense") == 1
    head, lines = table(rows)
    assert len(lines) == 8
    assert {len(line) for line in lines} == {len(head)}
    assert [line[3] for line in lines if line[1] == "dense"] == ["1.00 x", "1.00 x"]


def test_a_mechanism_that_cannot_run_is_named(run, picture, monkeypatch, tmp_path):
    def fail(*given):
        raise InputError("this map is too blue")

    monkeypatch.setattr("terrazzo.backbones.mixers.hedgehog.Hedgehog.mix", fail)
    out = tmp_path / "rows.csv"
    mechanisms = ("--mixer", "hedgehog", "--mixer", "softmax")
    options = ("--size", 64, 64, "--seconds", 0.01, "--device", "cpu", "--out", out)
    done = run("bench", "mixers", MODEL, *mechanisms, "--pictures", picture, *options)
    assert done.exit_code == 0, done.output
    assert "not run: hedgehog at 64x64: this map is too blue" in done.output
    assert {row.backend for row in results.read(out)} == {"dense", "softmax"}


@pytest.mark.long
def test_calibrates_on_other_pictures(run, picture, tmp_path):
    """A calibrated threshold selects more; a mixer without thresholds stays."""
    other = tmp_path / "other.png"
    shutil.copy(picture, other)
    selects = "anchor,edge=2,theta=-19.0,dense_up_to=0"
    densities = []
    for count in (0, 1):
        out = tmp_path / f"{count}.csv"
        places = ("--pictures", picture, "--pictures", other, "--calibrate", count)
        options = ("--size", 96, 96, "--seconds", 0.01, "--device", "cpu", "--out", out)
        done = run("bench", "mixers", MODEL, "--mixer", selects, "--mixer", "hedgehog", *places, *options)
        assert done.exit_code == 0, done.output
        densities += [row.p50 for row in results.read(out) if (row.backend, row.metric) == (selects, DENSITY)]
    assert densities[0] < densities[1] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--pictures"),
        (("--pictures", "nowhere"), "nowhere does not exist"),
        (("--mixer", "butter"), "butter: mixer must be one of"),
        (("--mixer", "llsa,topk"), "llsa,topk: mixer must be one of"),
        (("--mixer", "llsa", "--mixer-option", "topk"), "KEY=VALUE, got 'topk'"),
        (("--mixer", "hedgehog", "--mixer-option", "topk=3"), "'hedgehog' has no options, got topk"),
        (("--mixer-option", "topk=3"), "name a mixer with --mixer"),
        (("--reduce", "mctf,r=-1"), "mctf,r=-1: "),
        (("--size", 64, 65), "cannot take 64x65 images"),
        (("--picture", "x.txt"), "x.txt must end in .png"),
        (("--calibrate", 1), "--calibrate 1 leaves no picture to measure, since --pictures has 1"),
    ],
)
def test_refusals(refused, tmp_path, picture, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    pictures = () if not arguments or arguments[0] == "--pictures" else ("--pictures", picture)
    out = tmp_path / "rows.csv"
    assert words in refused("bench", "mixers", MODEL, *pictures, *arguments, "--out", out)
    assert not out.exists()


def test_only_plain_vits(refused, picture):
    assert "plain VisionTransformer" in refused("bench", "mixers", "resnet10t", "--pictures", picture)


def test_front():
    points = [(1.0, 1.0), (2.0, 0.9), (1.5, 0.8), (3.0, 0.5), (0.5, 0.99)]
    assert front(points) == [(1.0, 1.0), (2.0, 0.9), (3.0, 0.5)]

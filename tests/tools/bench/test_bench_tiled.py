"""`terrazzo bench tiled` runs a huge image by parts, beside the whole image."""

import sys

import pytest

from terrazzo.tools import results
from terrazzo.tools.bench.tiled import DIFFERENCE, PEAK, TIME, WHOLE, table

SIZE = ("--size", 128, 64, "--rows", 32, "--device", "cpu")
PARTS = "parts of 32 rows"


def test_rows_and_table(run, tmp_path):
    out = tmp_path / "rows.csv"
    done = run("bench", "tiled", "test_convnext", "test_vit", *SIZE, "--out", out)
    assert done.exit_code == 0, done.output
    rows = results.read(out)
    found = {(row.backend, row.metric): row.p50 for row in rows if row.variant == "test_convnext"}
    assert {row.shape for row in rows} == {"1x3x128x64"}
    assert {(WHOLE, TIME), (PARTS, TIME), (PARTS, DIFFERENCE)} <= set(found)
    assert found[PARTS, DIFFERENCE] < 1e-5
    assert ((WHOLE, PEAK) in found) == ((PARTS, PEAK) in found) == (sys.platform == "linux")
    assert [line[:3] for line in table(rows)[1]] == [
        (name, "128x64", form) for name in ("test_convnext", "test_vit") for form in (WHOLE, PARTS)
    ]


@pytest.mark.long
def test_maps_that_could_have_two_layouts(run):
    """Rows of a map of 256 channels, 4 columns wide, could be a map of NHWC with 32 columns."""
    options = ("--size", 1024, 64, "--rows", 512, "--no-whole", "--device", "cpu")
    done = run("bench", "tiled", "dinat_mini", *options)
    assert done.exit_code == 0, done.output
    assert "not run" not in done.output


def test_without_the_whole_image(run, tmp_path):
    out = tmp_path / "rows.csv"
    done = run("bench", "tiled", "test_convnext", *SIZE, "--no-whole", "--out", out)
    assert done.exit_code == 0, done.output
    assert {row.backend for row in results.read(out)} == {PARTS}
    assert DIFFERENCE not in {row.metric for row in results.read(out)}


def test_a_model_that_cannot_be_cut_is_named_and_others_go_on(run):
    done = run("bench", "tiled", "resnet10t", "test_vit", *SIZE, "--no-whole")
    assert done.exit_code == 0, done.output
    assert "not run: resnet10t: InputError: the model has modules that are not known to work on" in done.output
    assert [line.split()[0] for line in done.output.splitlines() if PARTS in line] == ["test_vit"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("butter",), "butter"), (("test_vit", "--rows", 0), "--rows"), (("test_vit", "--out", "."), "is a folder")],
)
def test_refusals(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("bench", "tiled", *arguments)
    assert not list(tmp_path.iterdir())

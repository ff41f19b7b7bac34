"""`terrazzo bench scaling` times models at several sizes, and fits how time grows with pixels."""

import math

import pytest
from PIL import Image

from terrazzo import backbones
from terrazzo.tools import results
from terrazzo.tools.bench import scaling
from terrazzo.tools.bench.exponents import MACS, by_model, exponent, table, upper
from terrazzo.tools.bench.families import representatives
from terrazzo.tools.inspect.timing import FORWARD
from terrazzo.tools.models import family_of, registered_models

SIDES = ("--side", 64, "--side", 32)


def test_exponents():
    """A constant cost lowers the exponent of all sides more than that of large images."""
    figures = {side: 3.0 * (side * side) ** 1.5 for side in (32, 64, 128, 256)}
    assert exponent(figures) == pytest.approx(1.5)
    with_constant = {side: 1e5 + time for side, time in figures.items()}
    assert list(upper(with_constant)) == [128, 256]
    assert exponent(with_constant) < exponent(upper(with_constant)) < 1.5
    assert math.isnan(exponent({32: 1.0}))


@pytest.mark.long
def test_rows_table_and_picture(run, tmp_path):
    out, drawn = tmp_path / "rows.csv", tmp_path / "times.png"
    options = ("--seconds", 0.01, "--device", "cpu", "--out", out, "--picture", drawn)
    done = run("bench", "scaling", "resnet10t", "test_vit", *SIDES, *options)
    assert done.exit_code == 0, done.output
    rows = results.read(out)
    times, macs = by_model(rows, FORWARD), by_model(rows, MACS)
    assert list(times) == list(macs) == ["resnet10t", "test_vit"]
    assert all(list(found) == [32, 64] for found in (*times.values(), *macs.values()))
    # Convolutions alone count, and every side is a multiple of the stride.
    assert exponent(macs["resnet10t"]) == pytest.approx(1, abs=1e-6)
    # Attention to all tokens adds to it, and the class token takes away.
    assert exponent(macs["test_vit"]) != pytest.approx(1, abs=1e-3)
    head, lines = table(rows)
    assert {line[0] for line in lines} == {"resnet10t", "test_vit"}
    assert {len(line) for line in lines} == {len(head)}
    assert [float(line[4]) for line in lines] == sorted(float(line[4]) for line in lines)
    assert Image.open(drawn).width > 500


def test_sides_that_take_too_long_are_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "throughput_timer", lambda device: lambda function: 8.0)
    out = tmp_path / "rows.csv"
    done = run("bench", "scaling", "resnet10t", *SIDES, "--most", 20, "--seconds", 0.01, "--out", out)
    assert done.exit_code == 0, done.output
    assert "not run: resnet10t: from side 64 on a call would take about 128 s; see --most" in done.output
    assert list(by_model(results.read(out), FORWARD)["resnet10t"]) == [32]


def test_sides_that_a_model_cannot_take(run):
    done = run("bench", "scaling", "test_vit", "--side", 64, "--side", 65, "--seconds", 0.01)
    assert done.exit_code == 0, done.output
    assert "not run: test_vit: at side 65: " in done.output
    assert "cannot take 65x65 images" in done.output


def test_a_model_of_every_family():
    found = set(representatives())
    assert {"dinat_tiny", "vmamba_tiny_s1l8", "mambavision_t"} <= found & set(registered_models())
    assert {family_of(name) for name in found & set(registered_models())} == set(backbones.FAMILIES)
    assert "convnext_tiny" in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("butter",), "butter"),
        (("resnet10t", "--side", 32), "at least two sides"),
        (("resnet10t", *SIDES, "--picture", "x.txt"), "x.txt must end in .png"),
    ],
)
def test_refusals(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("bench", "scaling", *arguments)
    assert not list(tmp_path.iterdir())

"""`terrazzo test --zoom`, `terrazzo infer --zoom` and `terrazzo zoom oracle`, run as by a user."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from terrazzo.gated_zoom import Heads
from terrazzo.tools import results
from terrazzo.tools.zoom.oracle import OracleRow
from terrazzo.tools.zoom.sweep import Point

SIZES = ("--zoom-tile", 32, "--zoom-halo", 16, "--zoom-stride", 16)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of trained heads for the segmentor of `trained`, whose gate spares every picture."""
    torch.manual_seed(0)
    made = Heads(128, scale=2, tile=32, classes=6)
    torch.nn.init.normal_(made.refine.mix.bias, std=10)
    made.trained[:] = True
    made.thresholds[:] = torch.tensor([0.5, 1.0])
    path = tmp_path_factory.mktemp("heads") / "heads.pth"
    torch.save({"state_dict": {f"heads.{name}": value for name, value in made.state_dict().items()}}, path)
    return path


def metrics(run, trained, floors, out, *options):
    done = run("test", *trained, "--data-root", floors, "--out", out, *options)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.stdout


def test_test(run, trained, floors, heads, tmp_path):
    plain, _ = metrics(run, trained, floors, tmp_path / "plain.json")
    found, said = metrics(run, trained, floors, tmp_path / "zoom.json", "--zoom", 2, "--budget", 0.5, *SIZES)
    # Pictures of 64 x 64: 32 x 32 coarse, and 2 of 4 crops of 64 x 64, which the picture bounds.
    assert found["megapixels per picture"] == pytest.approx((32**2 + 2 * 64**2) / 1e6)
    assert found["share of a full pass (%)"] == pytest.approx(225)
    assert found["gated off (%)"] == 0
    assert found["ms per picture"] > 0
    assert found.keys() - plain.keys() == {key for key in found if "picture" in key or "(%)" in key}
    assert "megapixels per picture" in said
    every, _ = metrics(run, trained, floors, tmp_path / "all.json", "--zoom", 2, "--budget", 1, *SIZES)
    assert every["mIoU"] == pytest.approx(plain["mIoU"], abs=0.01)  # each crop is the whole picture
    options = ("--zoom", 2, "--zoom-heads", heads, "--zoom-halo", 16, "--zoom-stride", 16)
    spared, _ = metrics(run, trained, floors, tmp_path / "spared.json", *options)
    assert spared["gated off (%)"] == 100
    assert spared["megapixels per picture"] == pytest.approx(32**2 / 1e6)
    refined, _ = metrics(run, trained, floors, tmp_path / "refined.json", *options, "--zoom-gate", 0, "--zoom-refine")
    assert refined["gated off (%)"] == 0
    assert refined["mIoU"] != plain["mIoU"]  # this refinement adds random numbers


def test_sweep(run, trained, floors, heads, tmp_path):
    plain, _ = metrics(run, trained, floors, tmp_path / "plain.json")
    options = ("--zoom", 2, "--zoom-heads", heads, "--zoom-gate", 0, *SIZES)
    by_head, _ = metrics(run, trained, floors, tmp_path / "region.json", "--budget", 0.5, *options)
    options += ("--zoom-score", "entropy", "--sweep", tmp_path / "curve.png")  # a sweep has all scores anyway
    done = run("test", *trained, "--data-root", floors, *options)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
    points = results.read(tmp_path / "curve.csv", Point)
    found = {(point.score, point.budget): point for point in points}
    assert {point.score for point in points} == {"full pass", "region", "entropy", "random", "oracle"}
    assert {point.metric for point in points} == {"mIoU"}
    assert found["full pass", 1].value == pytest.approx(plain["mIoU"], abs=0.01)
    for score in ("region", "entropy", "random", "oracle"):  # a point is what an evaluation at its budget gives
        assert found[score, 0].value == found["entropy", 0].value
        assert found[score, 1].value == pytest.approx(plain["mIoU"], abs=0.01)
    arguments = ("--zoom", 2, "--budget", 0.5, "--zoom-score", "entropy", *SIZES)
    alone, _ = metrics(run, trained, floors, tmp_path / "alone.json", *arguments)
    assert found["entropy", 0.5].value == pytest.approx(alone["mIoU"], abs=0.01)
    assert found["region", 0.5].value == pytest.approx(by_head["mIoU"], abs=0.01)
    assert found["entropy", 0.5].megapixels == pytest.approx(alone["megapixels per picture"])


def test_infer(run, trained, picture, tmp_path):
    config, checkpoint = trained
    places = []
    for name, options in (("plain", ()), ("zoom", ("--zoom", 2, "--budget", 0.5, *SIZES))):
        done = run("infer", config, picture, "--checkpoint", checkpoint, "--out", tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        places.append(np.asarray(Image.open(tmp_path / name / "floor.labels.png")))
    assert places[0].shape == places[1].shape == (67, 91)
    assert (places[0] != places[1]).any()


def test_refusals(refused, trained, floors, detector, picture):
    config, checkpoint = trained
    test = ("test", config, checkpoint, "--data-root", floors)
    assert "--budget is for a zoom" in refused(*test, "--budget", 0.5)
    assert "--sweep is for a zoom" in refused(*test, "--sweep", "x.png")
    sweep = (*test, "--zoom", 2, "--sweep")
    assert "--sweep writes its own table: leave --out out" in refused(*sweep, "x.png", "--out", "x.json")
    assert "its file must end with .png, got x.csv" in refused(*sweep, "x.csv")
    assert "must be a multiple" in refused(*test, "--zoom", 2, "--zoom-tile", 40)
    assert "needs a trained region head" in refused(*test, "--zoom", 2, "--zoom-score", "region")
    assert "refine=True needs a trained refinement" in refused(*test, "--zoom", 2, "--zoom-refine")
    assert "--zoom-refine is for a zoom" in refused(*test, "--zoom-refine")
    infer = ("infer", detector[0], picture, "--checkpoint", detector[1], "--zoom", 2)
    assert "gives masks" in refused(*infer)
    assert "--zoom is for segmentors and detectors" in refused("infer", "resnet10t", picture, "--zoom", 2)


def test_oracle(run, floors, tmp_path):
    """More tiles and finer labels are better, and the worst tiles have more than their share of the errors."""
    done = run(
        *("zoom", "oracle", "fpn_dinat-mini_floors", "--data-root", floors, "--split", "val", "--tile", 16),
        *("--factor", 4, "--factor", 8, "--out", tmp_path / "oracle.csv"),
    )
    assert done.exit_code == 0, done.output
    rows = results.read(tmp_path / "oracle.csv", OracleRow)
    values = {(row.metric, row.factor, row.share): row.value for row in rows}
    for factor in (4, 8):
        curve = [values["mIoU", factor, share] for share in (0, 0.1, 0.2, 0.3, 0.5)]
        assert curve == sorted(curve)
        assert values["wrong pixels in the tiles", factor, 0.5] > 50
    assert values["mIoU", 4, 0] > values["mIoU", 8, 0]
    assert f"{values['mIoU', 4, 0.3]:.1f}" in done.stdout

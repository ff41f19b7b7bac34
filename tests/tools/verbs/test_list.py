"""`terrazzo list`: the models and their facts."""

import pytest
import timm


def test_names_every_model_and_nothing_else(run):
    from terrazzo.tools.models import EVERY_MODEL, registered_models

    models = registered_models(EVERY_MODEL)
    assert {"dinat_mini", "rgt_s_x2", "mtair"} <= models.keys()
    assert "resnet18" not in models
    assert all(timm.is_model(name) for name in models)
    result = run("list")
    assert result.exit_code == 0
    first = [(line.split() or [""])[0] for line in result.stdout.splitlines()]
    assert [name for name in first if name not in ("model", "top-1:", "")] == list(models)


def test_counts_where_nobody_did(run, monkeypatch):
    before = [run("list", name).stdout for name in ("dinat_mini", "rgt_s_x2")]
    monkeypatch.setattr("terrazzo.tools.verbs.listing.results.read", lambda *_: [])
    assert [run("list", name).stdout for name in ("dinat_mini", "rgt_s_x2")] == before


def test_row(run):
    lines = run("list", "dinat_mini").stdout.splitlines()
    row = next(line for line in lines if line.split()[0] == "dinat_mini")
    assert row.split()[1:5] == ["dinat", "19.98", "81.8", "224x224"]


def test_rows_of_restoration_networks(run):
    """Only their section if the pattern or the family leaves no backbone; scale and tasks in place of accuracy."""
    lines = run("list", "--family", "rgt").stdout.splitlines()
    assert lines[0].split()[:6] == ["model", "family", "params", "(M)", "scale", "tasks"]
    names = [f"{name}_x{scale}" for name in ("rgt", "rgt_s") for scale in (2, 3, 4)]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(names)
    row = next(line for line in lines if line.startswith("rgt_s_x2"))
    assert row.split() == ["rgt_s_x2", "rgt", "10.05", "x2", "super-resolution", "apache-2.0"]
    assert run("list", "mta*").stdout.splitlines()[1].split()[1:5] == ["mtair", "45.89", "x1", "denoising,"]


@pytest.mark.long
def test_a_reconstruction_has_no_weights(run):
    assert run("list", "s2aformer_mini").stdout.splitlines()[1].endswith("no weights")
    assert "no official weights are public" in run("info", "s2aformer_mini").stdout


def test_patterns(run):
    by_part = run("list", "isotropic").stdout
    assert "dinat_isotropic_small" in by_part
    assert "dinat_mini" not in by_part
    by_glob = run("list", "nat_*", "--family", "dinat").stdout
    assert "\nnat_mini" in by_glob
    assert "\ndinat_mini" not in by_glob


def test_refusals(refused):
    assert "none of the" in refused("list", "granite")
    assert "the families are: asvit, attnet, dinat" in refused("list", "--family", "granite")

"""`terrazzo list`: the models and their facts."""

import timm


def test_names_every_model_and_nothing_else(run):
    from terrazzo.tools.models import registered_models

    models = registered_models()
    assert "dinat_mini" in models
    assert "resnet18" not in models
    assert all(timm.is_model(name) for name in models)
    result = run("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1:-1]] == list(models)


def test_counts_where_nobody_did(run, monkeypatch):
    before = run("list", "dinat_mini").stdout
    monkeypatch.setattr("terrazzo.tools.verbs.listing.results.read", lambda *_: [])
    assert run("list", "dinat_mini").stdout == before


def test_row(run):
    lines = run("list", "dinat_mini").stdout.splitlines()
    row = next(line for line in lines if line.split()[0] == "dinat_mini")
    assert row.split()[1:5] == ["dinat", "19.98", "81.8", "224x224"]


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

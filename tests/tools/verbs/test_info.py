"""`terrazzo info`: facts about a model."""

import json

import pytest


@pytest.mark.long
def test_json(run):
    result = run("info", "dinat_mini", "--size", 65, 97, "--in-chans", 1, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["family"] == "dinat"
    assert facts["input"] == [1, 1, 65, 97]
    assert facts["output"] == [1, 1000]
    assert [level["stride"] for level in facts["pyramid"]] == [4, 8, 16, 32]
    assert [level["channels"] for level in facts["pyramid"]] == [64, 128, 256, 512]
    for level in facts["pyramid"]:
        assert level["shape"][2:] == [-(-65 // level["stride"]), -(-97 // level["stride"])]
    assert facts["weights"]["licence"]
    assert facts["weights"]["top1_published"] == 81.8


@pytest.mark.long
def test_text(run):
    result = run("info", "dinat_mini")
    assert result.exit_code == 0
    for words in ("parameters", "multiply-adds", "activations", "stride", "1x64x56x56", "licence"):
        assert words in result.stdout


def test_weights_that_timm_cannot_fetch(run):
    assert "weights must be fetched by hand from https" in " ".join(run("info", "attnet_xxs").stdout.split())


def test_models_of_timm_itself(run):
    assert json.loads(run("info", "resnet18", "--json").stdout)["family"] == "timm"


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("rgt_s_x2", (128, 128)), ("mtair", (64, 64))])
def test_restoration_networks(run, name, size):
    facts = json.loads(run("info", name, "--size", "64", "64", "--json").output)
    assert facts["family"] == name.split("_")[0]
    assert facts["output"] == [1, 3, *size]
    assert facts["pyramid"] is None


@pytest.mark.long
def test_large_models_allocate_nothing(run):
    """A model with gigabytes of weights is described without building it."""
    facts = json.loads(run("info", "eva_giant_patch14_224", "--json").stdout)
    assert facts["params"] > 1e9


@pytest.mark.long
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_counts_do_not_depend_on_the_backend(run, monkeypatch, backend):
    """The backends cannot run here, or are not a single operation."""
    monkeypatch.delenv("TERRAZZO_BACKEND", raising=False)
    arguments = ("info", "dinat_mini", "--size", 32, 32, "--json")
    before = run(*arguments).stdout
    monkeypatch.setenv("TERRAZZO_BACKEND", backend)
    assert run(*arguments).stdout == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dinat_minny",), "dinat_mini"),
        (("resnet18.no_such_weights",), "resnet18.a1_in1k"),
        (("resnet18", "--size", 0, 5), "at least 1"),
        (("swin_tiny_patch4_window7_224", "--size", 65, 65), "cannot take 65x65"),
        (("resnet18", "--in-chans", 0), "--in-chans"),
    ],
)
def test_refusals(refused, arguments, words):
    assert words in refused("info", *arguments)

"""Stored capabilities belong to registered families, each has a test, and the tests can fail."""

import dataclasses
import importlib.util
from functools import lru_cache

import pytest
from support.capabilities import proven

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.models import registered_models
from terrazzo.tools.reports import capabilities as capability_results
from terrazzo.tools.reports import cards
from terrazzo.tools.reports.capabilities import CAPABILITIES, NO, YES, Cell

CELL = Cell("dinat", "timm", YES, "", "dinat_mini", "tests/x.py::TestX::test_timm", "torch 1", "abc")
REFUSED = dataclasses.replace(CELL, capability="onnx dynamic hw", supported=NO, reason="one size (only)")


@lru_cache
def module_of(path: str):
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py"), results.ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_family_has_every_capability_and_no_other_has_any():
    families = sorted(set(registered_models().values()))
    assert list(capability_results.read()) == [(family, name) for family in families for name in CAPABILITIES]


@pytest.mark.parametrize(
    "cell", capability_results.read().values(), ids=lambda cell: f"{cell.family}-{cell.capability}"
)
def test_a_row_is_what_its_test_claims(cell):
    path, kind, test = cell.test.split("::")
    contract = getattr(module_of(path), kind)
    assert test == f"test_{cell.capability.replace(' ', '_')}"
    assert callable(getattr(contract, test))
    assert contract.representatives[0] == cell.model
    assert registered_models()[cell.model] == cell.family
    assert contract.refused.keys() <= CAPABILITIES.keys()
    assert contract.refused.get(cell.capability, "") == cell.reason
    assert (cell.supported == NO) == bool(cell.reason)


def test_every_page_has_the_table():
    assert "<!-- table: capabilities -->" in (results.ROOT / "docs" / "export.md").read_text()
    for family in set(registered_models().values()):
        card = results.ROOT / "model_cards" / f"{family}.md"
        assert f"<!-- table: capabilities {family} -->" in card.read_text()


class TestProof:
    @pytest.fixture(autouse=True)
    def _stored(self, tmp_path, monkeypatch):
        monkeypatch.setattr(capability_results, "PATH", tmp_path / "capabilities.csv")
        results.write(capability_results.PATH, [REFUSED, CELL], Cell)

    def test_what_is_so(self):
        with proven(dataclasses.replace(CELL, versions="torch 2", commit="def"), False):
            pass
        with proven(REFUSED, False):
            raise InputError("images of one size (only), you see")

    def test_a_refusal_that_works(self):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"), proven(REFUSED, False):
            pass

    def test_a_refusal_for_another_reason(self):
        with pytest.raises(AssertionError, match="Regex pattern did not match"), proven(REFUSED, False):
            raise RuntimeError("out of memory")

    def test_a_promise_that_fails(self):
        with pytest.raises(RuntimeError, match="out of memory"), proven(CELL, True):
            raise RuntimeError("out of memory")

    @pytest.mark.parametrize("change", [{"model": "nat_mini"}, {"test": "tests/y.py::TestY::test_timm"}])
    def test_a_stale_row(self, change):
        with (
            pytest.raises(AssertionError, match=r"run `pytest tests/.\.py --write-capabilities`"),
            proven(dataclasses.replace(CELL, **change), False),
        ):
            pass

    def test_a_row_that_says_the_contrary(self):
        results.write(capability_results.PATH, [dataclasses.replace(CELL, supported=NO, reason="it cannot")], Cell)
        with pytest.raises(AssertionError, match="write-capabilities"), proven(CELL, False):
            pass

    def test_no_row(self):
        with (
            pytest.raises(AssertionError, match="no row of dinat, mmdet"),
            proven(dataclasses.replace(CELL, capability="mmdet"), False),
        ):
            pass

    def test_writing(self):
        new = dataclasses.replace(REFUSED, supported=YES, reason="")
        with proven(new, True):
            pass
        assert list(capability_results.read().values()) == [CELL, new]


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(capability_results, "PATH", tmp_path / "capabilities.csv")
    results.write(capability_results.PATH, [CELL, REFUSED, dataclasses.replace(REFUSED, family="other")], Cell)
    text = cards.render("<!-- table: capabilities -->\n<!-- end of table -->")
    assert "| [dinat](model_cards/dinat.md) | yes | not tested |" in text
    assert text.count("no (1)") == 2
    assert "(1) one size (only).\nTested with torch 1.\n" in text
    text = cards.render("<!-- table: capabilities other -->\n<!-- end of table -->")
    assert "| onnx dynamic hw: `terrazzo export --dynamic hw` | no (1) |" in text
    with pytest.raises(InputError, match="no rows of 'third'"):
        cards.render("<!-- table: capabilities third -->\n<!-- end of table -->")

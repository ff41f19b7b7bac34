"""The tables of README.md and of the model cards equal the registry and the result files."""

import itertools
import re

import pytest
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.reports import cards
from terrazzo.tools.verbs.cards import command

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.long
def test_pages_are_up_to_date():
    done = CliRunner().invoke(command, ["--check"], standalone_mode=False)
    assert done.return_value == 0, done.output


def test_every_model_is_counted():
    """Contracts check the counts (contract.py and restoration_contract.py in tests/support)."""
    from terrazzo.tools.models import registered_models

    metrics = ("parameters", "multiply-adds", "activations")
    for package, path in cards.COUNTS.items():
        names = sorted(registered_models((package,)))
        found = [(row.variant, row.metric) for row in results.read(path)]
        assert found == list(itertools.product(names, metrics))
    rows = results.read(cards.MODELS)
    assert cards.measure_model("dinat_mini") == [row for row in rows if row.variant == "dinat_mini"]


def test_a_stale_page_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("<!-- table: variants dinat -->\nold\n<!-- end of table -->\n")
    monkeypatch.setattr(cards, "pages", lambda: [page])
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert CliRunner().invoke(command, ["--check"], standalone_mode=False).return_value == 1
    assert "old" in page.read_text(), "--check changed the page"
    assert CliRunner().invoke(command, [], standalone_mode=False).return_value == 0
    assert "| `dinat_mini` | 19.98 |" in page.read_text()
    assert CliRunner().invoke(command, ["--check"], standalone_mode=False).return_value == 0


def test_every_family_has_a_line():
    from terrazzo.tools.models import registered_models

    lines = cards.TABLES["families"](None).splitlines()[2:]
    assert [re.search(r"\(model_cards/(\w+).md\)", line)[1] for line in lines] == sorted(
        set(registered_models().values())
    )
    line = next(line for line in lines if "s2aformer" in line)
    assert "| 5: `s2aformer_mini` ... | 5.0 to 24.8 | 0.4 to 4.2 | 75.1 to 82.3 | " in line
    assert re.search(r"\| (\d\.\d\d|-) \| no weights \|", line)


def test_runs_that_differ_show_their_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    rows = [
        results.Row("training", "m", "config", "float32", "3 seeds", metric, "1", *spread, "CPU", "torch", "c")
        for metric, *spread in (
            ("mIoU", 20.0, 21.0, 23.0),
            ("loss", 21.0, 21.0, 21.0),
            ("backbone parameters", 2e6, 2e6, 2e6),
        )
    ]
    results.write(tmp_path / "training_x.csv", rows)
    assert "| `m` | 2.0 | 21 (20 to 23) | 21 |" in cards.TABLES["training"]("x")


def test_unknown_table():
    with pytest.raises(InputError, match="no table is called 'nope'"):
        cards.render("<!-- table: nope -->\n<!-- end of table -->")


def test_a_file_that_is_no_table_of_results(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of results"):
        results.read(path)


def test_rows_survive_a_round_trip(tmp_path):
    rows = [results.Row("a", "b", "c", "d", "e", "f", "ms", 1.25, 2.0, 3.5, "g, 2 threads", "h", "i")]
    results.write(tmp_path / "rows.csv", rows)
    assert results.read(tmp_path / "rows.csv") == rows

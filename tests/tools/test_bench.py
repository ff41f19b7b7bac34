"""`terrazzo bench`: it measures what it says, and its table holds ratios of one run."""

import pytest
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import bench, bench_neighborhood_attention, results


def test_runs_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_neighborhood_attention, "SHAPES", [(1, 14, 1), (1, 14, 2)])
    out = tmp_path / "rows.csv"
    arguments = ["neighborhood_attention", "--seconds", "0.01", "--out", str(out)]
    done = CliRunner().invoke(bench.command, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    assert "gather takes" in done.output
    rows = results.read(out)
    assert {row.backend for row in rows} == {"portable", "gather", "dense"}
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)


def test_peers_compute_the_same():
    forms, _ = bench_neighborhood_attention._peers(2, 14, 2)
    import torch

    for form in forms.values():
        torch.testing.assert_close(form(), forms["gather"](), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no benchmark is called 'nope'"),
        (["neighborhood_attention", "--out", "no/such/x.csv"], "not a folder"),
    ],
)
def test_bad_input(arguments, message):
    done = CliRunner().invoke(bench.command, arguments, standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)

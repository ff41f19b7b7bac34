"""`terrazzo bench attentive_conv`: its peer computes attentive convolution, its tables hold ratios of one run."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from terrazzo.tools import bench, results
from terrazzo.tools import bench_attentive_conv as attentive
from terrazzo.tools.timing import FORWARD, TRAINING, Plan

PLAN = Plan(torch.device("cpu"), 0.01)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(attentive, "_AT_224", [(4, 6, 5)])


def call(*arguments):
    arguments = [*map(str, arguments), "--device", "cpu", "--seconds", "0.01", "--quick"]
    done = CliRunner().invoke(bench.command, ["attentive_conv", *arguments], standalone_mode=False)
    assert done.exception is None, done.output
    return done.output


def test_runs_and_writes(tmp_path):
    said = call("--out", tmp_path / "rows.csv")
    rows = results.read(tmp_path / "rows.csv")
    assert {row.backend for row in rows} == {"portable", "plain"}
    assert {row.metric for row in rows} == {FORWARD, TRAINING}
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)
    assert "1x4x6x5, float32" in said
    assert "plain takes" in said


def test_a_form_that_is_wrong_is_not_timed(monkeypatch):
    plain = attentive.plain
    monkeypatch.setattr(attentive, "plain", lambda *tensors: 1.1 * plain(*tensors))
    said = call("--pass", "both")
    assert "not run: plain, forward, 1x4x6x5, float32: its output is wrong: relative error 1.0e-01" in said
    assert "its gradient of x is wrong" in said


def test_a_gpus_cases_table_and_verdicts():
    plan = dataclasses.replace(PLAN, device=torch.device("cuda"))
    assert {case.dtype for case in attentive.cases("attentive_conv", plan)} == {torch.bfloat16}
    times = {"fused": 1.0, "portable": 3.0, "plain": 2.0, "plain compiled": 0.5}
    row = results.Row("", "", "1x2x3x4", "bfloat16", "", FORWARD, "ms", 0, 0, 0, "GPU", "torch", "c")
    rows = [dataclasses.replace(row, backend=name, p50=time) for name, time in times.items()]
    head, (line,) = attentive.table(rows)
    cells = dict(zip(head, line))
    assert (cells["fused, ms"], cells["portable takes"], cells["plain takes"]) == ("1.000", "3.0 x", "2.0 x")
    assert cells["plain compiled takes"] == "0.5 x"
    plain, compiled = attentive.verdicts(rows, "cuda")
    assert plain.endswith("target at least 1: met")
    assert compiled.endswith("target at least 1: missed")
    assert attentive.verdicts(rows, "cpu") == []

"""`terrazzo bench strip_attention`: its peers compute strip attention, its tables hold ratios of one run."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from terrazzo.kernels import strip_attention
from terrazzo.tools import bench, results
from terrazzo.tools import bench_strip_attention as strip
from terrazzo.tools.timing import FORWARD, TRAINING, Plan

PLAN = Plan(torch.device("cpu"), 0.01)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(strip, "_AT_224", [(20, 9, 2)])


def call(*arguments):
    arguments = [*map(str, arguments), "--device", "cpu", "--seconds", "0.01", "--quick"]
    done = CliRunner().invoke(bench.command, ["strip_attention", *arguments], standalone_mode=False)
    assert done.exception is None, done.output
    return done.output


@pytest.mark.parametrize("form", [strip.plain, strip.padded])
def test_peers(form):
    inputs = strip.Case(2, 20, 9, 3, 8, torch.float64).inputs(torch.device("cpu"))
    wanted = strip_attention(*inputs, backend="reference")
    torch.testing.assert_close(form(*inputs), wanted)
    grad = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (form(*inputs), wanted))):
        torch.testing.assert_close(a, b)


def test_runs_and_writes(tmp_path):
    said = call("--out", tmp_path / "rows.csv")
    rows = results.read(tmp_path / "rows.csv")
    assert {row.backend for row in rows} == {"portable", "plain", "padded sdpa"}
    assert {row.metric for row in rows} == {FORWARD, TRAINING}
    assert "1x20x9x2x32, float32" in said
    assert "plain takes" in said


def test_a_form_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(strip, "padded", lambda *tensors: 1.1 * strip.plain(*tensors))
    said = call("--pass", "both")
    assert "not run: padded sdpa, forward, 1x20x9x2x32, float32: its output is wrong: relative error 1.0e-01" in said
    assert "its gradient of the query is wrong" in said


def test_a_gpus_cases_table_and_verdicts():
    plan = dataclasses.replace(PLAN, device=torch.device("cuda"))
    assert {case.dtype for case in strip.cases("strip_attention", plan)} == {torch.bfloat16}
    times = {"fused": 1.0, "portable": 3.0, "plain": 2.0, "plain compiled": 0.5}
    row = results.Row("", "", "1x2x3x4x32", "bfloat16", "", FORWARD, "ms", 0, 0, 0, "GPU", "torch", "c")
    rows = [dataclasses.replace(row, backend=name, p50=time) for name, time in times.items()]
    head, (line,) = strip.table(rows)
    cells = dict(zip(head, line))
    assert (cells["fused, ms"], cells["portable takes"], cells["plain takes"]) == ("1.000", "3.0 x", "2.0 x")
    assert (cells["plain compiled takes"], cells["padded sdpa takes"]) == ("0.5 x", "not run")
    plain, compiled = strip.verdicts(rows, "cuda")
    assert plain.endswith("target at least 1: met")
    assert compiled.endswith("target at least 1: missed")
    assert strip.verdicts(rows, "cpu") == []

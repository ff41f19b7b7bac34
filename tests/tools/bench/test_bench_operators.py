"""`terrazzo bench OPERATOR`: peers give the operator's results, and tables hold ratios from a single run."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench import registry
from terrazzo.tools.bench.operators import benchmark as bench_operators
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Plan
from terrazzo.tools.verbs import bench

SMALL = {
    "attentive_conv": (4, 6, 5),
    "block_sparse_attention": (24, 2, 4, 8, 2),
    "grouped_linear": (5, 3, 4, 6),
    "selective_scan": (4, 9, 2),
    "softmax_free_attention": (20, 5, 2, 8),
    "ssd": (9, 2, 4, 3),
    "strip_attention": (20, 9, 2, 8),
    "token_reduction": (11, 2, 4),
    "varlen_attention": (3, 5, 2, 4),
}
PLAN = Plan(torch.device("cpu"), 0.01)


@pytest.fixture(params=list(bench_operators.OPERATORS))
def operator(request, monkeypatch):
    """Each operator's benchmark, with a single small size."""
    found = dataclasses.replace(bench_operators.OPERATORS[request.param], at_224=(SMALL[request.param],))
    monkeypatch.setitem(bench_operators.OPERATORS, found.name, found)
    return found


def call(operator, *arguments):
    arguments = [operator.name, *map(str, arguments), "--device", "cpu", "--seconds", "0.01", "--quick"]
    done = CliRunner().invoke(bench.command, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    return done.output


def test_peers(operator):
    inputs = bench_operators._leaves(operator.inputs((2, *operator.at_224[0]), torch.device("cpu")), torch.float64)
    wanted = operator.run(*inputs, backend="reference")
    grad = torch.randn_like(wanted)
    leaves = [x for x in inputs if x.requires_grad]
    assert len(leaves) == len(operator.arguments)
    gradients = torch.autograd.grad(wanted, leaves, grad)
    assert set(operator.compiled) <= operator.peers.keys()
    for form in (*operator.peers.values(), *operator.gpu_peers.values()):
        found = form(*inputs)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(torch.autograd.grad(found, leaves, grad), gradients, strict=True):
            torch.testing.assert_close(a, b)


def _cpu_kernels(operator):
    return {"fused"} if bench_operators.has_cpu_kernels(operator) else set()


def test_runs_and_writes(operator, tmp_path):
    said = call(operator, "--out", tmp_path / "rows.csv")
    rows = results.read(tmp_path / "rows.csv")
    assert {row.backend for row in rows} == {"portable", *operator.peers} | _cpu_kernels(operator)
    assert {row.metric for row in rows} == {FORWARD, TRAINING}
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)
    assert f"{'x'.join(map(str, (1, *operator.at_224[0])))}, float32" in said
    assert all(f"{name} takes" in said for name in operator.peers)


def test_a_form_that_is_wrong_is_not_timed(operator, monkeypatch):
    (name, right), *_ = operator.peers.items()
    wrong = {name: lambda *inputs: 1.1 * right(*inputs)}
    monkeypatch.setitem(bench_operators.OPERATORS, operator.name, dataclasses.replace(operator, peers=wrong))
    said = call(operator, "--pass", "both")
    shape = "x".join(map(str, (1, *operator.at_224[0])))
    assert f"not run: {name}, forward, {shape}, float32: its output is wrong: relative error 1.0e-01" in said
    assert f"its gradient of {operator.arguments[0]} is wrong" in said


def test_a_gpus_cases_table_and_verdicts(operator):
    plan = dataclasses.replace(PLAN, device=torch.device("cuda"))
    assert {case.dtype for case in bench_operators.cases(operator.name, plan)} == {torch.bfloat16}
    name = next(iter(operator.peers))
    times = {"fused": 1.0, "portable": 3.0, name: 2.0, f"{name} compiled": 0.5}
    row = results.Row(operator.name, "", "1x2x3x4", "bfloat16", "", FORWARD, "ms", 0, 0, 0, "GPU", "torch", "c")
    rows = [dataclasses.replace(row, backend=form, p50=time) for form, time in times.items()]
    head, (line,) = bench_operators.table(rows)
    cells = dict(zip(head, line))
    assert cells["fused, ms"] == "1.000"
    forms = ["portable", name] + ([f"{name} compiled"] if name in operator.compiled else [])
    ratios = {"portable": "3.0 x", name: "2.0 x", f"{name} compiled": "0.5 x"}
    assert [cells[f"{form} takes"] for form in forms] == [ratios[form] for form in forms]
    plain, *others = bench_operators.verdicts(rows, "cuda")
    assert plain.endswith("target at least 1: met")
    if name in operator.compiled:
        compiled, *others = others
        assert compiled.endswith("target at least 1: missed")
    assert all("not measured" in line for line in others)
    assert bench_operators.verdicts(rows, "cpu") == []


def test_compiled_forms_are_measured_on_a_gpu(operator):
    """Compiled forms are measured on a GPU by default, and on a CPU on request."""
    found = {}
    for device in ("cpu", "cuda"):
        plan = dataclasses.replace(PLAN, device=torch.device(device))
        found[device] = bench_operators._forms(operator, [], plan).keys()
    compiled = {f"{name} compiled" for name in operator.compiled}
    assert found["cuda"] - found["cpu"] == {"fused", *compiled, *operator.gpu_peers} - _cpu_kernels(operator)
    assert found["cpu"] == {"portable", *operator.peers} | _cpu_kernels(operator)
    asked = dataclasses.replace(PLAN, device=torch.device("cpu"), compiled=True)
    assert bench_operators._forms(operator, [], asked).keys() == found["cpu"] | compiled


def test_every_operator_is_measured():
    assert bench_operators.OPERATORS.keys() <= registry.BENCHMARKS.keys()
    with pytest.raises(InputError, match="no benchmark is called 'nope'"):
        registry.module_of("nope")

"""`terrazzo bench FAMILY_runtimes`: each runtime is checked before it is timed, and compared with eager PyTorch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench import families as bench_families
from terrazzo.tools.bench import runtimes as bench_runtimes
from terrazzo.tools.bench.families import Family, Images
from terrazzo.tools.export.checked import Report
from terrazzo.tools.export.formats import onnx as onnx_export
from terrazzo.tools.export.parity import Parity
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Plan
from terrazzo.tools.reports import cards
from terrazzo.tools.verbs import bench

RUNTIMES = {"eager", "onnxruntime", "openvino", "openvino default"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench_families.FAMILIES, "dinat", Family("test_resnet", (), (Images(32, 64),)))


def call(*arguments):
    arguments = ["dinat_runtimes", "--device", "cpu", "--seconds", "0.01", *map(str, arguments)]
    return CliRunner().invoke(bench.command, arguments, standalone_mode=False)


def worked(*arguments):
    done = call(*arguments)
    assert done.exception is None, done.output
    return done.output


def rows(**times):
    about = ("CPU", "torch", "c")
    return [
        results.Row(
            *("dinat_runtimes", "dinat_tiny", "1x3x224x224"),
            "bfloat16" if name == "openvino_default" else "float32",
            *(name.replace("_", " "), FORWARD, "ms", ms, ms, ms),
            *about,
        )
        for name, ms in times.items()
    ]


@pytest.mark.long
def test_runs_and_writes(small, tmp_path):
    out = tmp_path / "rows.csv"
    said = worked("--no-compile", "--out", out)
    found = results.read(out)
    assert {row.backend for row in found} == RUNTIMES
    assert {(row.what, row.variant, row.shape, row.metric) for row in found} == {
        ("dinat_runtimes", "test_resnet", "1x3x32x64", FORWARD)
    }
    assert {row.dtype for row in found if row.backend != "openvino default"} == {"float32"}
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in found)
    assert "x the time of eager PyTorch (1x3x32x64); target at most 1: " in said
    resumed = worked("--no-compile", "--out", out, "--resume")
    assert results.read(out) == found
    assert "ONNX Runtime takes" in resumed


def test_what_is_wrong_is_not_timed(small, monkeypatch):
    """Compiled models are measured by default, so they are checked, too."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: 2 * model(x))
    wrong = Report(Path("x.onnx.failed"), 1, (Parity("output_0", "example", 0.5, 1e-4, False),), "opset 20")
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *arguments: wrong)
    said = worked()
    assert "not run: compiled, 1x3x32x64: its output is wrong: relative error 1.0e+00, limit 1e-03" in said
    reason = "the exported file differs from PyTorch: relative error 5.0e-01"
    assert f"not run: onnxruntime, 1x3x32x64 and 2 more: {reason}" in said
    assert "test_resnet, onnxruntime: not measured; target at most 1" in said


def test_refusals():
    plan = Plan(torch.device("cuda"), 1.0)
    with pytest.raises(InputError, match="give --device cpu"):
        bench_runtimes.cases("dinat_runtimes", plan)
    plan = dataclasses.replace(plan, device=torch.device("cpu"))
    assert len(bench_runtimes.cases("dinat_runtimes", dataclasses.replace(plan, passes=(FORWARD,)))) == 2
    with pytest.raises(InputError, match="leave --pass out"):
        bench_runtimes.cases("dinat_runtimes", dataclasses.replace(plan, passes=(TRAINING,)))


def test_table_and_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    found = rows(eager=100.0, onnxruntime=72.0, openvino_default=40.0)
    results.write(tmp_path / "dinat_runtimes_cpu.csv", found)
    text = cards.render("<!-- table: bench dinat_runtimes -->\n<!-- end of table -->")
    assert (
        "| images | dinat_tiny, eager, ms | torch.compile takes | ONNX Runtime takes | OpenVINO in float32 takes |"
        in text
    )
    assert "OpenVINO by default (bfloat16) takes" in text
    assert "| 1x3x224x224 | 100.0 | not run | 0.72 x | not run | 0.40 x |" in text
    unit = "x the time of eager PyTorch (1x3x224x224); target at most 1"
    assert bench_runtimes.verdicts(found, "cpu") == [f"dinat_tiny, onnxruntime: 0.72 {unit}: met"]
    slow = rows(eager=100.0, onnxruntime=101.0)
    assert bench_runtimes.verdicts(slow, "cpu") == [f"dinat_tiny, onnxruntime: 1.01 {unit}: missed"]

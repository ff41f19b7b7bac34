"""`terrazzo bench`: its measurements are right, and its tables hold ratios from a single run."""

import dataclasses
import importlib.util
import subprocess

import pytest
import torch
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench import backbones as bench_backbones
from terrazzo.tools.bench import families as bench_families
from terrazzo.tools.bench import registry
from terrazzo.tools.bench.families import Family, Images, Target
from terrazzo.tools.bench.neighborhood import benchmark as bench_neighborhood_attention
from terrazzo.tools.bench.neighborhood import cases as neighborhood_cases
from terrazzo.tools.bench.neighborhood import gpu
from terrazzo.tools.bench.neighborhood.cases import Case
from terrazzo.tools.bench.verdicts import verdict
from terrazzo.tools.cli import cli
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Plan
from terrazzo.tools.models import registered_models
from terrazzo.tools.reports import cards
from terrazzo.tools.verbs import bench

CPU_KERNELS = {"fused"} if importlib.util.find_spec("numba") else set()


@pytest.fixture(autouse=True)
def _one_thread():
    """Use a single thread: on a busy machine, threads of a tiny problem mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(*arguments):
    arguments = [str(argument) for argument in (*arguments, "--seconds", "0.01")]
    return CliRunner().invoke(bench.command, arguments, standalone_mode=False)


def worked(*arguments):
    done = call(*arguments)
    assert done.exception is None, done.output
    return done.output


def row(backend, p50, metric=FORWARD, variant="kernel 7 dilation 1", shape="1x200x320x2x32", what="x"):
    unit = "GB/s" if backend == "copy" else "ms"
    return results.Row(what, variant, shape, "bfloat16", backend, metric, unit, p50, p50, p50, "GPU", "torch", "c")


def test_every_family_has_an_entry():
    assert set(registered_models().values()) <= set(bench_families.FAMILIES)
    for name in registry.BENCHMARKS:
        module = registry.module_of(name)
        plan = Plan(torch.device("cpu"), 1.0)
        assert 0 < len(module.cases(name, dataclasses.replace(plan, quick=True))) < len(module.cases(name, plan))
        for part in ("measure", "table", "verdicts"):
            assert callable(getattr(module, part))


@pytest.mark.parametrize("kind", [None, *registry.KINDS])
def test_list(kind):
    """The list holds plain names, for the loop of `make bench`."""
    done = CliRunner().invoke(bench.command, ["--list", *([] if kind is None else [kind])])
    assert done.exit_code == 0
    assert done.output.splitlines() == list(registry.BENCHMARKS if kind is None else registry.KINDS[kind])


def test_make_bench_measures_every_operator_and_family(tmp_path):
    """The Makefile's loop runs with a fake Python that records the names of benchmarks."""
    (tmp_path / "bin").mkdir()
    said = tmp_path / "said"
    for kind in registry.KINDS:  # what the command prints, by its arguments: its start takes seconds
        arguments = ["bench", "--list", kind]
        (tmp_path / " ".join(arguments)).write_text(CliRunner().invoke(cli, arguments).stdout)
    for name, text in {
        "python": f'case "$1" in -c) exit 1;; *) echo "$4" >> {said};; esac',
        "terrazzo": f'exec cat "{tmp_path}/$*"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".installed").touch()
    subprocess.run(["make", "-s", "-C", str(results.ROOT), "bench", f"VENV={tmp_path}"], check=True)
    assert said.read_text().split() == [*registry.KINDS["operators"], *sorted(set(registered_models().values()))]


class TestOperatorOnCpu:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr(bench_neighborhood_attention, "SHAPES", [(1, 14, 1), (1, 14, 2)])

    def test_runs_and_writes(self, tmp_path):
        out = tmp_path / "rows.csv"
        said = worked("neighborhood_attention", "--device", "cpu", "--out", out)
        assert "gather takes" in said
        rows = results.read(out)
        assert {row.backend for row in rows} == {"portable", "gather", "dense"} | CPU_KERNELS
        assert {row.metric for row in rows} == {FORWARD, TRAINING}
        assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)

    def test_one_pass(self):
        said = worked("neighborhood_attention", "--device", "cpu", "--pass", "forward")
        assert "backward" not in said

    def test_goes_on(self, tmp_path, monkeypatch):
        out = tmp_path / "rows.csv"
        worked("neighborhood_attention", "--device", "cpu", "--out", out)
        whole = results.read(out)
        results.write(out, whole[: len(whole) // 2])
        measured = []
        measure = bench_neighborhood_attention.measure
        monkeypatch.setattr(
            bench_neighborhood_attention, "measure", lambda case, plan: measured.append(case) or measure(case, plan)
        )
        worked("neighborhood_attention", "--device", "cpu", "--out", out, "--resume")
        assert [case.dilation for case in measured] == [(2, 2)]
        again = results.read(out)
        assert again[: len(whole) // 2] == whole[: len(whole) // 2]
        assert len(again) == len(whole)

    def test_rows_of_another_machine_are_not_mixed_in(self, tmp_path):
        out = tmp_path / "rows.csv"
        results.write(out, [row("portable", 1.0)])
        done = call("neighborhood_attention", "--device", "cpu", "--out", out, "--resume")
        assert isinstance(done.exception, InputError)
        assert "holds rows from GPU at commit c" in str(done.exception)

    def test_a_form_that_is_wrong_is_not_timed(self, monkeypatch):
        dense = bench_neighborhood_attention.peers.dense
        monkeypatch.setattr(bench_neighborhood_attention.peers, "dense", lambda *tensors: 1.1 * dense(*tensors))
        said = worked("neighborhood_attention", "--device", "cpu", "--quick")
        assert "not run: dense, forward, 1x14x14x1x32, kernel 7 dilation 1, float32" in said
        assert "its output is wrong: relative error 1.0e-01" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no benchmark is called 'nope'"),
        (["neighborhood_attention", "--out", "no/such/x.csv"], "not a folder"),
        (["neighborhood_attention", "--device", "abacus"], "the device 'abacus' cannot be used"),
        (["neighborhood_attention", "--resume"], "--resume continues the file that --out names"),
    ],
)
def test_bad_input(arguments, message):
    done = call(*arguments)
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


class TestOperatorOnGpu:
    """The GPU's benchmark on the CPU; the portable form replaces the fused form, and times are invented."""

    @pytest.mark.long
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_the_command(self, monkeypatch, tmp_path):
        cases = [
            Case(1, (14, 17), 1, (5, 3), (2, 3), dim=16, bias=bias, dtype=dtype)
            for bias, dtype in ((True, torch.float32), (False, torch.bfloat16))
        ]
        monkeypatch.setattr(bench_neighborhood_attention, "_on_gpu", lambda plan: True)
        monkeypatch.setattr(gpu, "cases", lambda quick: cases)
        monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: (1e9, 2e9, 3e9))
        attend = gpu.attend
        monkeypatch.setattr(
            gpu, "attend", lambda case, backend, *tensors: attend(case, backend.replace("fused", "portable"), *tensors)
        )
        out = tmp_path / "rows.csv"
        said = worked("neighborhood_attention", "--device", "cpu", "--out", out)
        found = {(row.backend, row.metric) for row in results.read(out)}
        assert {("copy", "copy bandwidth"), ("flex", FORWARD)} < found
        assert {(name, metric) for name in ("fused", "portable", "dense") for metric in (FORWARD, TRAINING)} < found
        assert "1x14x17x1x16, kernel 5x3 dilation 2x3, no bias, bfloat16" in said
        assert "not run: natten hopper-fna" in said
        assert "not run: flex, forward+backward" in said  # FlexAttention has no backward pass on a CPU
        assert "FlexAttention takes: " in said

    def test_shapes(self):
        full, quick = gpu.cases(False), gpu.cases(True)
        assert len({str(case) for case in full}) == len(full)
        assert set(quick) < set(full)
        assert {case.dtype for case in full} == {torch.bfloat16, torch.float16}
        assert {(799, 1201), (200, 320)} < {case.size for case in quick}
        for case in full:
            assert all(n >= k * d for n, k, d in zip(case.size, case.kernel, case.dilation)), case

    def test_table_and_verdicts(self):
        rows = [
            row("copy", 4000.0, "copy bandwidth"),
            row("fused", 0.024),
            row("flex", 0.06),
            row("fused", 0.09, TRAINING),
            row("flex", 0.18, TRAINING),
            row("natten a", 0.02, variant="kernel 7 dilation 1, no bias"),
            row("natten b", 0.03, variant="kernel 7 dilation 1, no bias"),
            row("fused", 0.025, variant="kernel 7 dilation 1, no bias"),
            row("copy", 4000.0, "copy bandwidth", variant="kernel 7 dilation 1, no bias"),
        ]
        # 4 tensors of 200 x 320 x 2 x 32 with two bytes each have 32.768 MB; at 4 TB/s they take 8.2 us.
        head, lines = bench_neighborhood_attention.table(rows)
        cells = [dict(zip(head, line)) for line in lines]
        assert cells[0]["fused, ms"] == "0.024"
        assert cells[0]["of its floor"] == "2.9 x"
        assert cells[0]["flex takes"] == "2.5 x"
        assert cells[0]["dense takes"] == "not run"
        assert cells[2]["natten takes"] == "0.8 x"
        floor, backward, flex, natten = bench_neighborhood_attention.verdicts(rows, "cuda")
        assert floor.endswith("2.93 to 3.05 x the memory floor (2 cases); target at most 4: met")
        assert "2.75 x forward" in backward
        assert backward.endswith("target at most 3: met")
        assert flex.endswith("target at least 2: met")
        assert "0.80 x our time" in natten
        assert natten.endswith("target at least 1: missed")


class TestBackbones:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        targets = (Target("cpu", "test_convnext", 1e-3), Target("cpu", "test_convnext", 1e-3, throughput=True))
        family = Family("test_resnet", ("test_convnext", "no_such_model"), (Images(32, 64),), targets=targets)
        monkeypatch.setitem(bench_families.FAMILIES, "dinat", family)

    def test_runs_and_writes(self, tmp_path):
        out = tmp_path / "rows.csv"
        said = worked("dinat", "--device", "cpu", "--pass", "both", "--out", out)
        rows = results.read(out)
        assert {(row.variant, row.metric) for row in rows} == {
            (name, metric) for name in ("test_resnet", "test_convnext") for metric in (FORWARD, TRAINING)
        }
        assert {row.shape for row in rows} == {"1x3x32x64"}
        assert "test_convnext takes" in said
        assert "not run: no_such_model, 1x3x32x64, float32, eager, forward and 1 more: RuntimeError: Unknown" in said
        assert "x the time of test_convnext (1x3x32x64, float32); target at most 0.001: missed" in said
        assert "x the images/s of test_convnext (1x3x32x64, float32); target at least 0.001: met" in said

    def test_training_steps(self, tmp_path, monkeypatch):
        """A full run on a CPU also measures training steps of a family, which change its weights."""
        family = Family("test_resnet", ("test_convnext",), (Images(32, 64),), training=(Images(32, 32, 2),))
        monkeypatch.setitem(bench_families.FAMILIES, "dinat", family)
        worked("dinat", "--device", "cpu", "--out", tmp_path / "rows.csv")
        found = {(row.shape, row.metric) for row in results.read(tmp_path / "rows.csv")}
        assert found == {("1x3x32x64", FORWARD), ("2x3x32x32", bench_backbones.STEP)}
        plan = Plan(torch.device("cpu"), 0.01, quick=True)
        assert [case.metric for case in bench_backbones.cases("dinat", plan)] == [FORWARD]
        (case,) = bench_backbones.cases("dinat", dataclasses.replace(plan, quick=False))[1:]
        step = bench_backbones._function("test_resnet", case, plan)
        weights = list(step.args[0].parameters())
        before = [x.detach().clone() for x in weights]
        step()
        assert not torch.equal(before[0], weights[0])

    def test_models_with_arguments(self, tmp_path, monkeypatch):
        """Names of variants need not be names of models; models may return maps instead of logits."""
        maps = ("test_resnet", dict(features_only=True, out_indices=(2,)))
        family = Family("its map", ("test_resnet",), (Images(32, 64),), variants={"its map": maps})
        monkeypatch.setitem(bench_families.FAMILIES, "dinat", family)
        said = worked("dinat", "--device", "cpu", "--pass", "both", "--out", tmp_path / "rows.csv")
        assert {row.variant for row in results.read(tmp_path / "rows.csv")} == {"its map", "test_resnet"}
        assert "not run" not in said

    def test_models_of_one_size_are_built_for_the_images(self):
        model = bench_backbones._build("swin_tiny_patch4_window7_224", Images(64, 96))
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)

    def test_a_gpus_cases(self):
        plan = Plan(torch.device("cuda"), 1.0, compiled=True)
        found = [str(case) for case in bench_backbones.cases("dinat", plan)]
        assert "128x3x224x224, bfloat16, eager, forward" in found
        assert "1x3x1024x2048, bfloat16, compiled, forward" in found

    def test_rows_of_another_family(self):
        with pytest.raises(InputError, match="to none of the measured families"):
            bench_backbones.table([row("eager", 1.0)])


class TestCards:
    def test_backbones(self, tmp_path, monkeypatch):
        monkeypatch.setattr(results, "FOLDER", tmp_path)
        wanted = {"dinat_tiny": 100.0, "swin_tiny_patch4_window7_224": 250.0}
        rows = [row("eager", ms, variant=name, shape="2x3x224x224", what="dinat") for name, ms in wanted.items()]
        results.write(tmp_path / "dinat_cpu.csv", rows)
        results.write(tmp_path / "dinat_gpu.csv", rows)
        for name in ("dinat", "dinat_gpu"):
            text = cards.render(f"<!-- table: bench {name} -->\n<!-- end of table -->")
            assert "| 2x3x224x224, bfloat16, eager | forward | 100.0 | 20 | 2.5 x | not run |" in text
            assert "Measured on GPU, torch, medians." in text

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("dinat", "has no rows; run `terrazzo bench dinat --device cpu --out"),
            ("neighborhood_attention_gpu", "run `terrazzo bench neighborhood_attention --device cuda --out"),
            ("nope", "no benchmark is called 'nope'"),
        ],
    )
    def test_no_rows(self, tmp_path, monkeypatch, name, message):
        monkeypatch.setattr(results, "FOLDER", tmp_path)
        with pytest.raises(InputError, match=message):
            cards.render(f"<!-- table: bench {name} -->\n<!-- end of table -->")


def test_verdict_names_the_worst():
    ratios = {"a": 3.0, "b": 5.0, "c": 4.5}
    said = verdict("forward", ratios, 4, True, "x floor")
    assert said == "forward: 3.00 to 5.00 x floor (3 cases); target at most 4: missed in 2, worst on b"
    assert verdict("forward", {}, 4, True, "x floor") == "forward: not measured; target at most 4"


def test_a_wrong_gradient_is_noticed():
    case = Case(1, (9, 9), 2, (3, 3), dim=8)
    inputs = case.inputs(torch.device("cpu"))
    grad = torch.randn_like(inputs[0])
    wanted = neighborhood_cases.expected(case, inputs, grad, training=True)
    right = neighborhood_cases.gradients(lambda: neighborhood_cases.attend(case, "reference", *inputs), inputs, grad)
    assert neighborhood_cases.fault(case, wanted, right) is None
    wrong = (*right[:3], right[3] * float("nan"))
    assert "gradient of the bias is wrong" in neighborhood_cases.fault(case, wanted, wrong)

"""`terrazzo explain`: the counts of `info`, the model's layers, and the operators' reasons."""

import importlib
import json
import sys
import types
from pathlib import Path

import click
import pytest
import timm
import torch
from torch import nn

import terrazzo.kernels
from terrazzo.errors import install_command
from terrazzo.kernels.dispatch.operator import Call, Needs, Operator
from terrazzo.kernels.numba_host import machine as numba_machine
from terrazzo.kernels.triton_host import machine
from terrazzo.tools.inspect.costs import explain
from terrazzo.tools.inspect.explanation import ranges, reasons
from terrazzo.tools.inspect.trace import trace

CPU = torch.device("cpu")
NO_NUMBA = f"needs the package numba, which is not installed; {install_command('cpu')}"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("TERRAZZO_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def without_numba(monkeypatch):
    """Whatever this machine has: without Numba no kernels run on a CPU."""
    monkeypatch.setattr(numba_machine, "has_numba", lambda: False)


@pytest.fixture(scope="module")
def mini():
    with torch.device("meta"):
        return timm.create_model("dinat_mini").eval()


@pytest.fixture
def gpu(monkeypatch):
    """A fake device that the fused form accepts as a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    machine.device_refusal.cache_clear()
    yield torch.device("cuda", 0)
    machine.device_refusal.cache_clear()


def facts_of(run, *arguments, exit_code=0):
    result = run("explain", *arguments, "--device", "cpu", "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.mark.long
@pytest.mark.parametrize(("model", "size"), [("dinat_mini", (65, 97)), ("resnet18", (65, 97))])
def test_counts_are_those_of_info(run, model, size):
    facts = facts_of(run, model, "--size", *size)
    info = json.loads(run("info", model, "--size", *size, "--json").stdout)
    assert {key: facts[key] for key in ("params", "macs", "activations")} == {
        key: info[key] for key in ("params", "macs", "activations")
    }
    assert facts["flops"] == 2 * facts["macs"] == sum(cost["flops"] for cost in facts["costs"])
    assert facts["weight_bytes"] == 4 * facts["params"]
    assert facts["activation_bytes"] == 4 * facts["activations"]


def test_one_record_for_each_call(run, mini):
    calls = facts_of(run, "dinat_mini")["calls"]
    layers = [name for name, module in mini.named_modules() if type(module).__name__ == "NeighborhoodAttention"]
    assert [call["layer"] for call in calls] == layers
    assert [call["parameters"]["dilation"] for call in calls[:5]] == ["1", "8", "1", "1", "4"]
    map_bytes = 4 * 56 * 56 * 64
    assert calls[1] == {
        "layer": "stages.0.blocks.1.attn",
        "operator": "neighborhood_attention",
        "shape": {"B": 1, "H": 56, "W": 56, "heads": 2, "dim": 32},
        "parameters": {"kernel": "7", "dilation": "8"},
        "backend": "portable",
        "asked": "auto",
        "asked_by": "auto",
        "refused": {"fused": NO_NUMBA},
        "flops": 2 * 2 * 56 * 56 * 64 * 49,
        "bytes_read": 3 * map_bytes + 4 * 2 * 13 * 13,
        "bytes_written": map_bytes,
    }


def test_costs_are_apart_by_operator_and_by_module(run):
    facts = facts_of(run, "dinat_mini", "--size", 64, 64)
    costs = {cost["kind"]: cost for cost in facts["costs"]}
    assert facts["costs"][0]["kind"] == "neighborhood_attention"
    for key in ("flops", "bytes_read", "bytes_written"):
        assert costs["neighborhood_attention"][key] == sum(call[key] for call in facts["calls"])
    assert costs["Linear"]["layers"] == 18 * 4 + 1
    assert costs["Conv2d"]["layers"] == 2 + 3
    assert costs["GELU"]["flops"] == 0
    assert costs["GELU"]["bytes_read"] == costs["GELU"]["bytes_written"] > 0


@pytest.mark.long
def test_batch_and_dtype(run):
    one = facts_of(run, "dinat_mini", "--size", 64, 64)
    two = facts_of(run, "dinat_mini", "--size", 64, 64, "--batch", 2, "--dtype", "bfloat16")
    assert two["input"] == [2, 3, 64, 64]
    assert two["flops"] == 2 * one["flops"]
    assert two["weight_bytes"] == one["weight_bytes"] // 2
    assert two["calls"][0]["bytes_written"] == one["calls"][0]["bytes_written"]
    assert two["calls"][0]["shape"]["B"] == 2


class TestReasons:
    def test_auto(self, run):
        out = run("explain", "dinat_mini", "--device", "cpu").stdout
        assert "dinat_mini, 1x3x224x224, float32, on cpu" in out
        assert "neighborhood_attention, 18 calls" in out
        assert "stages.2.blocks.5.attn  1x14x14x8x32             7, 2              portable     9.8  0.77" in out
        assert "portable runs: it is the first of fused, portable, reference that is not refused (all calls)" in out
        assert f"fused is refused: {NO_NUMBA} (all calls)" in out
        assert "2.69 G (2,694,812,672)" in out

    def test_kernels_for_cpus(self, run, monkeypatch):
        monkeypatch.setattr(numba_machine, "has_numba", lambda: True)
        neighbors, grid = facts_of(run, "dinat_mini")["calls"][:2]
        assert (neighbors["backend"], neighbors["refused"]) == ("fused", {})
        assert grid["backend"] == "portable"
        assert "windows of 49 keys" in grid["refused"]["fused"]

    def test_environment_names_a_backend(self, run, monkeypatch):
        """The reference does not call the opaque op, but every call is still found and counted."""
        before = facts_of(run, "dinat_mini", "--size", 64, 64)
        monkeypatch.setenv("TERRAZZO_BACKEND", "reference")
        facts = facts_of(run, "dinat_mini", "--size", 64, 64)
        assert {call["backend"] for call in facts["calls"]} == {"reference"}
        assert {call["asked_by"] for call in facts["calls"]} == {"the environment variable TERRAZZO_BACKEND"}
        assert facts["costs"] == before["costs"]
        assert facts["activations"] == before["activations"]
        assert "asked for by the environment variable TERRAZZO_BACKEND" in reasons(facts["calls"])[0]

    def test_option_goes_before_environment(self, run, monkeypatch):
        monkeypatch.setenv("TERRAZZO_BACKEND", "reference")
        calls = facts_of(run, "dinat_mini", "--size", 64, 64, "--backend", "portable")["calls"]
        assert {(call["backend"], call["asked_by"]) for call in calls} == {("portable", "--backend")}

    def test_named_backend_that_cannot_run(self, run, monkeypatch):
        result = run("explain", "dinat_mini", "--backend", "fused", "--device", "cpu")
        assert result.exit_code == 1
        assert "fused, asked for by --backend, cannot run: the model raises BackendError (all calls)" in result.stdout
        assert f"fused is refused: {NO_NUMBA}" in result.stdout
        monkeypatch.setenv("TERRAZZO_BACKEND", "fused")
        facts = facts_of(run, "dinat_mini", exit_code=1)
        assert {(call["backend"], call["asked"]) for call in facts["calls"]} == {(None, "fused")}

    @pytest.mark.long
    def test_interpreter(self, run, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(machine, "has_triton", lambda: True)
        call = facts_of(run, "dinat_mini", "--size", 32, 32)["calls"][0]
        assert call["backend"] == "portable"
        assert "TRITON_INTERPRET" in call["refused"]["fused"]
        named = facts_of(run, "dinat_mini", "--size", 32, 32, "--backend", "fused")["calls"][0]
        assert named["backend"] == "fused"
        assert named["refused"] == {}

    def test_gpu(self, mini, gpu):
        """The given device decides, not the device on which shapes were traced."""
        facts = explain(mini, trace(mini, 64), gpu)
        assert {call["backend"] for call in facts["calls"]} == {"fused"}
        assert reasons(facts["calls"]) == [
            "fused runs: it is the first of fused, portable, reference that is not refused (all calls)"
        ]

    def test_some_layers_only(self, gpu):
        with torch.device("meta"):
            model = timm.create_model("dinat_mini", num_heads=(2, 4, 1, 16))
        lines = reasons(explain(model, trace(model, 64), gpu)["calls"])
        assert [line.partition(" ")[0] for line in lines] == ["fused", "portable", "fused"]
        assert lines[1].endswith("(stages.2.blocks.0-5.attn)")
        assert lines[2] == "fused is refused: needs a head_dim from 8 to 128 (stages.2.blocks.0-5.attn)"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.0.x", "a.1.x", "a.2.x"], "a.0-2.x"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], "a.0.b.0-1, a.1.b.0-1"),
        (["a.0", "b.0", "b.1"], "a.0, b.0-1"),
        (["a.0", "a.2", "a.2", "a.4"], "a.0, a.2, a.4"),
        (["a.9.x", "a.10.x", "a.10.y"], "a.9-10.x, a.10.y"),
        (["a.0.0", "a.0.1", "a.1.1"], "a.0.0-1, a.1.1"),
        ([""], ""),
    ],
)
def test_ranges(names, text):
    assert ranges(names) == text


def test_model_without_operators(run):
    result = run("explain", "resnet18", "--backend", "fused")
    assert result.exit_code == 0
    assert "calls no operator of terrazzo" in result.stdout
    assert "1.81 G (1,814,073,344)" in result.stdout


@pytest.mark.long
def test_narrow_terminal(run, monkeypatch):
    """Headers wrap; names and figures do not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    out = click.unstyle(run("explain", "dinat_tiny", "--size", 800, 1333, "--device", "cpu").stdout)
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("stages.")]
    assert len(rows) == 30
    assert rows[20] == ["stages.2.blocks.13.attn", "1x50x84x8x32", "7,", "2", "portable", "210.7", "16.41"]
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith(" "))


@pytest.fixture
def doubled():
    """An op `terrazzo::doubled`, which is gone after the test: other tests list all ops."""
    with torch.library._scoped_library("terrazzo", "FRAGMENT") as library:
        library.define("doubled(Tensor x, int times) -> Tensor")
        library.impl("doubled", lambda x, times: x * 2**times, "CPU")
        library.impl("doubled", lambda x, times: torch.empty_like(x), "Meta")
        yield torch.ops.terrazzo.doubled


def test_a_new_operator_is_found_by_its_name(monkeypatch, gpu, doubled):
    """A new operator needs only an op `terrazzo::y` and a module `terrazzo.kernels.y.op`."""

    class Twice(nn.Module):
        def forward(self, x):
            return doubled(x, 3)

    operator = Operator(
        "doubled",
        opaque=(),
        needs=lambda x, times: Needs(x.device, x.dtype, "it is odd" if times % 2 else None),
        describe=lambda x, times: Call({"N": x.numel()}, {"times": str(times)}),
    )
    model = nn.Sequential(nn.ReLU(), Twice())
    assert explain(model, trace(model, (4, 5)), CPU)["calls"] == []
    for name in ("terrazzo.kernels.doubled", "terrazzo.kernels.doubled.op"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["terrazzo.kernels.doubled.op"].OPERATOR = operator
    (call,) = explain(model, trace(model, (4, 5)), gpu)["calls"]
    assert (call["operator"], call["layer"], call["backend"]) == ("doubled", "1", "portable")
    assert call["shape"] == {"N": 60}
    assert call["parameters"] == {"times": "3"}
    assert call["refused"] == {"fused": "it is odd"}
    assert call["bytes_read"] == call["bytes_written"] == 240


def test_every_operator_describes_itself():
    folder = Path(terrazzo.kernels.__file__).parent
    # An operator that consists of standard operations has no op.
    operators = [path.parent.name for path in folder.glob("*/op.py")]
    assert operators
    for name in operators:
        assert hasattr(torch.ops.terrazzo, name)
        assert importlib.import_module(f"terrazzo.kernels.{name}.op").OPERATOR.name == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dinat_minny",), "dinat_mini"),
        (("dinat_mini", "--size", 0, 5), "at least 1"),
        (("dinat_mini", "--size", 10**30, 5), "at most"),
        (("dinat_mini", "--size", 2**24, 2**24, "--batch", 2**40), "cannot take 16777216x16777216"),
        (("swin_tiny_patch4_window7_224", "--size", 65, 65), "cannot take 65x65"),
        (("dinat_mini", "--batch", 0), "--batch"),
        (("dinat_mini", "--device", "floor"), "'floor'"),
        (("dinat_mini", "--device", "cuda:99"), "'cuda:99'"),
        (("dinat_mini", "--dtype", "int8"), "bfloat16"),
        (("dinat_mini", "--backend", "nope"), "portable"),
    ],
)
def test_refusals(refused, arguments, words):
    assert words in refused("explain", *arguments)


@pytest.mark.long
def test_refuses_an_environment_that_names_no_backend(refused, monkeypatch):
    monkeypatch.setenv("TERRAZZO_BACKEND", "nope")
    assert (
        "backend 'nope', asked for by the environment variable TERRAZZO_BACKEND, is not one of auto, fused"
        in refused("explain", "dinat_mini")
    )

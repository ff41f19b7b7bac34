"""Neighborhood attention's CPU kernels against the definition in float64, with memory poisoned by NaN."""

import importlib
import math

import numpy as np
import pytest
import torch
from support import triton_neighborhood as problem
from support.processes import run_code
from support.triton_common import check

from terrazzo.errors import BackendError
from terrazzo.kernels import neighborhood_attention, use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
fused_cpu = importlib.import_module("terrazzo.kernels.neighborhood_attention.fused_cpu")
kernels = importlib.import_module("terrazzo.kernels.neighborhood_attention.fused_cpu_kernels")
OPERATOR = importlib.import_module("terrazzo.kernels.neighborhood_attention.op").OPERATOR

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


@pytest.fixture
def small_tiles(monkeypatch):
    """Maps of a few tiles that are small enough for the reference."""
    monkeypatch.setattr(fused_cpu, "_TILE", (3, 8))
    monkeypatch.setattr(fused_cpu, "_BACK_TILE", (4, 6))
    monkeypatch.setattr(fused_cpu, "_WORK", 1 << 12)


class TestKernels:
    @pytest.mark.parametrize(
        ("size", "kernel", "dilation"),
        [
            ((7, 7), 7, 1),  # map = kernel: all queries share a window
            ((14, 21), 7, (2, 3)),  # grid attention
            ((15, 14), 7, 2),  # classes of two lengths
            ((8, 9), 7, 1),  # every query is near a border
            ((24, 18), 2, 1),  # even windows, in all sizes of blocks of rows
            ((11, 14), (6, 4), (1, 3)),
            ((19, 29), 8, (2, 3)),
            ((15, 20), (5, 15), (3, 1)),  # several vectors of columns
            ((28, 30), (11, 13), 1),
            ((17, 14), (4, 3), (4, 4)),
        ],
    )
    def test_shapes(self, size, kernel, dilation):
        check(problem.errors(size, kernel, dilation, dim=16))

    @pytest.mark.parametrize(
        ("size", "kernel", "dilation"), [((23, 41), 7, 1), ((25, 26), (3, 5), (2, 1)), ((33, 20), 6, (5, 3))]
    )
    def test_tiles(self, small_tiles, size, kernel, dilation):
        """First, inner and last tiles of an axis, the last one shorter, and several calls of a kernel."""
        check(problem.errors(size, kernel, dilation, heads=2, batch=2))

    def test_a_map_of_whole_tiles(self):
        check(problem.errors((36, 70), 7, dim=32))

    @pytest.mark.parametrize("dim", [1, 8, 12, 24, 32, 40, 64, 72, 130])
    def test_head_dims(self, dim):
        check(problem.errors((9, 10), 5, dim=dim))

    def test_windows_too_large_for_the_gradient(self):
        """Forward fused, backward portable."""
        check(problem.errors((20, 18), (17, 16)))

    @pytest.mark.parametrize("layout", ["packed", "plain", "turned"])
    def test_layouts_heads_and_batches(self, layout):
        check(problem.errors((7, 9), 3, 2, heads=3, dim=24, batch=2, layout=layout))

    def test_without_bias(self):
        check(problem.errors((10, 15), 7, dim=32, bias=False))

    @pytest.mark.parametrize(("length", "kernel", "dilation"), [(7, 7, 1), (41, 7, 3), (150, 40, 1)])
    def test_sequences(self, length, kernel, dilation):
        check(problem.errors((length,), kernel, dilation))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        check(problem.errors((14, 15), 7, 2, dim=32, dtype=dtype))

    def test_half_inputs_with_a_float32_bias(self):
        assert problem.mixed_autocast() == ("torch.bfloat16", "torch.float32")

    @pytest.mark.long
    @pytest.mark.parametrize("bias", [True, False])
    def test_float64(self, small_tiles, bias):
        arguments = problem._inputs((13, 17), (5, 3), 2, 12, 2, torch.float64, bias, "packed")
        found, wanted = (problem._run(arguments, (5, 3), (1, 2), name) for name in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("magnitude", [1e-4, 1e4])
    def test_scores_of_any_size_stay_finite(self, magnitude):
        assert problem.large_scores(magnitude)

    @pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "bias"])
    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_goes_where_it_goes_in_the_definition(self, small_tiles, which, number):
        """To the queries that see it, and to no neighbour in a tile or in a vector."""
        arguments = problem._inputs((11, 12), (5, 5), 2, 8, 1, torch.float32, True, "plain")
        arguments = [x.detach().clone() for x in arguments]
        arguments[which][(0, 4, 7, 1, 3) if which < 3 else (1, 6, 2)] = number
        arguments = [x.requires_grad_() for x in arguments]
        found, wanted = (problem._run(arguments, 5, 1, name) for name in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparison must notice."""

    @pytest.mark.parametrize(
        "helper",
        ["", "class_members", "window_start", "first_query", "last_query", "exp2", "keep", "add_rows", "largest_of"],
    )
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        for name in ("forward", "backward", "turn", "gather"):
            plain = getattr(kernels, name).py_func  # interpreted, with pieces that can be replaced
            monkeypatch.setattr(kernels, name, plain)
        pieces = {name: getattr(kernels, name) for name in ("class_members", "window_start", "first_query")}
        pieces |= {name: getattr(kernels, name) for name in ("last_query", "keep", "add_rows", "largest_of")}
        broken = {
            "class_members": lambda length, first, dilation: length // dilation,
            "window_start": lambda member, members, kernel: min(max(member - 1, 0), members - kernel),
            "first_query": lambda *given: pieces["first_query"](*given) + (pieces["first_query"](*given) > 0),
            "last_query": lambda *given: pieces["last_query"](*given) - 1,
            "keep": lambda vector, count, other: vector,
            "add_rows": lambda *given: None,
            "largest_of": lambda vector: vector[0] + 200,
        }
        if helper in broken:
            monkeypatch.setattr(kernels, helper, broken[helper])
        if helper == "exp2":  # a factor of all weights would cancel
            monkeypatch.setattr(
                kernels, "exp2", lambda x: np.exp2(x) * np.where(x == 0, np.float32(1), np.float32(0.9))
            )
        with np.errstate(all="ignore"):
            found = problem.errors((11, 7), (5, 3), (2, 1), dim=8)
        assert any(not error <= 2 * allowed for error, allowed in found.values()) == bool(helper)


class TestThreads:
    @pytest.mark.parametrize("dilation", [1, 3])
    def test_the_number_of_threads_changes_no_bit(self, small_tiles, dilation):
        before = torch.get_num_threads()
        arguments = problem._inputs((30, 33), (5, 5), 3, 16, 2, torch.float32, True, "packed")
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(problem._run(arguments, 5, dilation, "fused"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class TestOperator:
    def test_auto_takes_it(self):
        x = torch.zeros(1, 14, 14, 1, 4)
        assert OPERATOR.why("auto", x).name == "fused"
        assert OPERATOR.why("auto", x, x, x, None, (7, 7), (1, 1)).name == "fused"

    def test_auto_skips_it_where_it_is_slower(self):
        """Windows that fill their residue classes, and large windows: PyTorch does these products better."""
        grid = torch.zeros(1, 56, 56, 1, 4)
        assert OPERATOR.why("auto", grid, grid, grid, None, (7, 7), (8, 8)).name == "portable"
        x = torch.zeros(1, 26, 26, 1, 4)
        choice = OPERATOR.why("auto", x, x, x, None, (13, 13), (2, 2))
        assert (choice.name, list(choice.reasons)) == ("portable", ["fused"])
        assert "windows of 169 keys" in choice.reasons["fused"]
        assert OPERATOR.why("auto", x, x, x, None, (13, 13), (1, 1)).name == "fused"
        assert OPERATOR.why("fused", x, x, x, None, (13, 13), (2, 2)).runs
        large = torch.zeros(1, 80, 80, 1, 4)
        assert OPERATOR.why("auto", large, large, large, None, (21, 21), (1, 1)).name == "portable"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = problem._inputs((9, 10), (5, 5), 2, 8, 1, torch.float32, True, "packed")
        auto, portable = (problem._run(arguments, 5, 1, name) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            problem._run(arguments, 5, 1, "auto")

    @pytest.mark.parametrize("bias", [True, False])
    def test_opcheck(self, bias):
        problem.opcheck((9, 11), (3, 5), (1, 2), bias)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_nothing_is_kept_but_the_inputs(self, dtype):
        q = torch.zeros(1, 8, 8, 2, 4, dtype=dtype)
        _, sums = torch.ops.terrazzo.neighborhood_attention(q, q, q, None, [3, 3], [1, 1], 0.5, "fused")
        assert sums.shape == (0,)

    @pytest.mark.long
    def test_gradcheck(self):
        arguments = problem._inputs((7, 6), (3, 2), 2, 2, 1, torch.float64, True, "packed")
        assert torch.autograd.gradcheck(
            lambda q, k, v, rpb: neighborhood_attention(q, k, v, (3, 2), (2, 1), rpb, backend="fused"), arguments
        )

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        torch._dynamo.reset()
        compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in ((15, 14), (17, 23)):
            for kernel in (7, 9):
                if min(size) < kernel:
                    continue
                arguments = problem._inputs(size, (kernel, kernel), 2, 8, 1, torch.float32, True, "packed")
                given = (*arguments[:3], kernel, 1, arguments[3])
                torch.testing.assert_close(compiled(*given), neighborhood_attention(*given))

    @pytest.mark.long
    def test_numba_comes_at_the_first_call(self):
        code = (
            "import sys, torch, terrazzo.kernels as k; x = torch.zeros(1, 6, 6, 1, 8)\n"
            "assert 'numba' not in sys.modules\n"
            "k.neighborhood_attention(x, x, x, 3)\n"
            "assert 'numba' in sys.modules"
        )
        done = run_code(code)
        assert done.returncode == 0, done.stderr

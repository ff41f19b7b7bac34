"""Strip attention's CPU kernels are compared with the definition in float64, in memory poisoned with NaN."""

import importlib
import itertools
import math

import pytest
import torch
from support import triton_strip
from support.triton_common import check

from terrazzo.errors import BackendError
from terrazzo.kernels import strip_attention, use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.strip_attention.fused_cpu_kernels")
products = importlib.import_module("terrazzo.kernels.numba_host.fused_products")
fused_cpu = importlib.import_module("terrazzo.kernels.strip_attention.fused_cpu")
op = importlib.import_module("terrazzo.kernels.strip_attention.op")

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


class TestKernels:
    @pytest.mark.parametrize(
        ("queries", "keys"),
        [*itertools.product((1, 15, 16, 17, 40), (1, 7, 8, 9, 49)), (530, 5), (20, 300), (1030, 129)],
    )
    def test_lengths(self, queries, keys):
        """Queries that fill no vector or several parts, and keys of several pieces."""
        check(triton_strip.errors(queries=queries, keys=keys))

    @pytest.mark.parametrize("dim", [1, 8, 15, 16, 24, 33, 64, 136])
    def test_head_dims(self, dim):
        # With one channel a result has few elements, and the error depends on how the processor's libraries round.
        check(triton_strip.errors(queries=21, keys=20, dim=dim), times=2 if dim == 1 else 1)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        check(triton_strip.errors(queries=70, keys=49, dim=32, heads=2, dtype=dtype))

    @pytest.mark.long
    def test_float64(self):
        arguments = triton_strip.inputs(2, 37, 150, 3, 12)
        found, wanted = (triton_strip.run(arguments, name) for name in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("layout", ["packed", "turned"])
    def test_layouts_heads_and_batches(self, layout):
        check(triton_strip.errors(2, 35, 18, 3, 24, layout=layout))

    @pytest.mark.parametrize("magnitude", [1e-4, 1e4])
    def test_scores_of_any_size(self, magnitude):
        assert triton_strip.large_scores(magnitude) < 2e-3

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_what_is_not_finite_stays_so(self, name, value):
        """Where the definition has a finite number, infinity or none, the form has the same."""
        arguments = dict(
            zip(("query", "key", "value"), (x.detach() for x in triton_strip.inputs(2, 35, 20, 2, 9, torch.float32)))
        )
        arguments[name][(1, 3, 1, 2)[: arguments[name].dim()]] = value
        found, wanted = (strip_attention(**arguments, backend=backend) for backend in ("fused", "reference"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_nothing_to_do(self):
        assert triton_strip.empty() == [
            [(0, 4, 1, 8), (0, 4, 1), (0, 5, 1), (0, 5, 1, 8)],
            [(2, 0, 1, 8), (2, 0, 1), (2, 5, 1), (2, 5, 1, 8)],
        ]


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparison must fail."""

    @pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
    @pytest.mark.parametrize(
        "helper",
        ["", "add_multiples_apart", "falling", "sum_of", "gather", "_to_queries", "_of_values", "_to_keys"],
    )
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        # The kernels' bodies run in Python, so their parts can be replaced.
        for name in ("gather", "read_queries", "forward", "backward"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
        module = products if helper == "add_multiples_apart" else kernels
        whole = getattr(module, helper, None)
        if helper == "gather":  # the smallest key is taken for the largest
            monkeypatch.setattr(kernels, helper, lambda *arguments: whole(*arguments)[::-1])
        elif helper in ("_to_queries", "_of_values", "_to_keys"):  # the last row of each product is lost

            def short(sums, step, rows, *more):
                whole(sums, step, rows - 1, *more)

            monkeypatch.setattr(kernels, helper, short)
        elif helper == "falling":  # small weights are lost
            monkeypatch.setattr(kernels, helper, lambda x: whole(x) * (x > -1))
        elif helper:

            def broken(*arguments):
                found = whole(*arguments)
                return tuple(x * 0.9 for x in found) if isinstance(found, tuple) else found * 0.9

            monkeypatch.setattr(module, helper, broken)
        arguments = triton_strip.inputs(1, 21, 9, 2, 24, torch.float32)
        arguments[0] = arguments[0].detach().mul(40).requires_grad_()
        wanted = triton_strip.exact(arguments)
        found = triton_strip.run(arguments, "fused")
        near = [bool((a - b).norm() <= 1e-4 * b.norm()) for a, b in zip(found, wanted)]
        assert all(near) == (not helper)


class TestOperator:
    def test_auto_takes_it_where_it_pays(self):
        """Few weights with gradients are left to standard operations."""
        why = op.OPERATOR.why
        small, large = ([x.float() for x in triton_strip.inputs(1, n, 64, 1, 8)] for n in (2048, 2049))
        assert why("auto", *(x.detach() for x in small)).name == "fused"
        small, large = ([x.detach().requires_grad_() for x in given] for given in (small, large))
        assert why("auto", *large).name == "fused"
        found = why("auto", *small)
        assert found.name == "portable"
        assert "at most 131072 weights" in found.reasons["fused"]
        assert why("fused", *small).name == "fused"
        with torch.no_grad():
            assert why("auto", *small).name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = triton_strip.inputs(1, 20, 7, 2, 8, torch.float32)
        auto, portable = (triton_strip.run(arguments, name) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            strip_attention(*arguments)

    def test_the_number_of_threads_changes_no_bit(self, monkeypatch):
        monkeypatch.setattr(fused_cpu, "_WORK", 1)
        before, results = torch.get_num_threads(), []
        arguments = triton_strip.inputs(2, 600, 20, 3, 16, torch.float32)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(triton_strip.run(arguments, "fused"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    def test_the_backward_pass_takes_the_form_of_the_forward_pass(self, monkeypatch):
        arguments, calls = triton_strip.inputs(1, 9, 5, 1, 8, torch.float32), []
        out = strip_attention(*arguments, backend="fused")
        whole = fused_cpu.backward
        monkeypatch.setattr(fused_cpu, "backward", lambda *given: calls.append(1) or whole(*given))
        with use_backend("portable"):
            out.sum().backward()
        assert calls

    def test_opcheck(self):
        triton_strip.opcheck(9, 5)

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_compiles_without_a_break(self, dynamic):
        torch._dynamo.reset()
        assert triton_strip.compiled(dynamic) == 0

    def test_whole_model(self):
        assert triton_strip.model(False) < 1e-4

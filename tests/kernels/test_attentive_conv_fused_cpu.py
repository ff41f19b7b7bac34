"""Attentive convolution's CPU kernels are compared with the definition in float64, in memory poisoned with NaN."""

import importlib
import itertools
import math

import pytest
import torch
from support import triton_attentive
from support.triton_common import check

from terrazzo.errors import BackendError
from terrazzo.kernels import attentive_conv, use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.attentive_conv.fused_cpu_kernels")
fused_cpu = importlib.import_module("terrazzo.kernels.attentive_conv.fused_cpu")
OPERATOR = importlib.import_module("terrazzo.kernels.attentive_conv.op").OPERATOR

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


class TestKernels:
    @pytest.mark.parametrize(
        ("height", "width"), [*itertools.product((1, 2, 3, 7), (1, 2, 3, 8)), (10, 1), (9, 13), (61, 50)]
    )
    def test_sizes(self, height, width):
        """Maps without an inner position, and bins that are added up in parts."""
        check(triton_attentive.errors(height=height, width=width))

    @pytest.mark.parametrize("channels", [1, 7, 9, 31, 32, 33, 40, 72])
    def test_channels(self, channels):
        check(triton_attentive.errors(channels=channels, height=5, width=9))

    @pytest.mark.parametrize("taps", [25, 49])
    def test_other_kernels(self, taps):
        check(triton_attentive.errors(2, 6, 11, 8, taps=taps))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        check(triton_attentive.errors(2, 24, 9, 10, dtype))

    @pytest.mark.long
    def test_float64(self):
        arguments = triton_attentive.inputs(2, 9, 7, 5)
        found, wanted = (triton_attentive.run(arguments, name) for name in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("layout", ["contiguous", "parts", "turned"])
    def test_layouts_and_batches(self, layout):
        check(triton_attentive.errors(3, 5, 6, 9, layout=layout))

    def test_half_values_beside_float32(self):
        """As under autocast."""
        errors, dtypes = triton_attentive.mixed()
        assert max(errors) < 1e-2
        assert dtypes == [f"torch.{dtype}" for dtype in ("bfloat16", "float32", "bfloat16", *["float32"] * 5)]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_stays_so(self, value):
        arguments = [x.detach() for x in triton_attentive.inputs(2, 9, 6, 5, dtype=torch.float32)]
        arguments[1][1, 3, 2, 2] = value
        found, wanted = (attentive_conv(*arguments, backend=name) for name in ("fused", "portable"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_nothing_to_do(self):
        arguments = triton_attentive.inputs(0, 4, 5, 5, dtype=torch.float32)
        found = triton_attentive.run(arguments, "fused")
        assert [x.shape for x in found] == [(0, 4, 5, 5), *(x.shape for x in arguments)]

    def test_result_is_channels_last(self):
        for layout in ("contiguous", "channels last"):
            out = attentive_conv(*triton_attentive.inputs(2, 6, 5, 4, layout=layout), backend="fused")
            assert out.is_contiguous(memory_format=torch.channels_last)


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparison must fail."""

    @pytest.mark.parametrize("helper", ["", "dot", "product", "add_products", "add_taps", "overlap", "_sum_1"])
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        # The kernels' bodies run in Python, so their parts can be replaced.
        for name in ("pool", "spread", "product", "convolve", "correlate"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
        whole = getattr(kernels, helper, None)
        if helper == "overlap":  # the last row or column counts as outside
            monkeypatch.setattr(kernels, "overlap", lambda at, length, side: whole(at, length - 1, side))
        elif helper in ("add_taps", "_sum_1"):
            monkeypatch.setattr(kernels, helper, lambda *arguments: None)
        elif helper:

            def broken(*arguments):
                found = whole(*arguments)
                return tuple(x * 0.9 for x in found) if isinstance(found, tuple) else found * 0.9

            monkeypatch.setattr(kernels, helper, broken)
        found = triton_attentive.errors(channels=8, height=61, width=47)
        failed = [name for name, (error, allowed) in found.items() if not error <= 2 * allowed]
        assert bool(failed) == bool(helper)


class TestOperator:
    def test_auto_takes_it(self):
        assert OPERATOR.why("auto", *triton_attentive.inputs(1, 4, 5, 5, taps=25)).name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = triton_attentive.inputs(1, 4, 5, 5, dtype=torch.float32)
        auto, portable = (triton_attentive.run(arguments, name) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            attentive_conv(*arguments)

    def test_the_number_of_threads_changes_no_bit(self, monkeypatch):
        monkeypatch.setattr(fused_cpu, "_WORK", 1)
        before, results = torch.get_num_threads(), []
        arguments = triton_attentive.inputs(2, 33, 20, 30, dtype=torch.float32)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(triton_attentive.run(arguments, "fused"))
        finally:
            torch.set_num_threads(before)
        # PyTorch's products of weights may depend on its threads; what the kernels give first does not.
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0])
            torch.testing.assert_close(results[0], other)

    @pytest.mark.long
    def test_opcheck(self):
        triton_attentive.opcheck()

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_compiles_without_a_break(self, dynamic):
        torch._dynamo.reset()
        assert triton_attentive.compiled(dynamic) == 0

    def test_whole_model(self):
        assert triton_attentive.model(False) < 1e-4

"""The state space dual's CPU kernels are compared with the definition in float64, in memory poisoned with NaN."""

import importlib
import math

import pytest
import torch
from support import triton_ssd
from support.triton_common import check, limits, poisoned

from terrazzo.errors import BackendError
from terrazzo.kernels import ssd, use_backend
from terrazzo.kernels.numba_host import machine
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.ssd.fused_cpu_kernels")
fused_cpu = importlib.import_module("terrazzo.kernels.ssd.fused_cpu")
OPERATOR = importlib.import_module("terrazzo.kernels.ssd.op").OPERATOR
CHUNK = fused_cpu.CHUNK

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


class TestKernels:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
    def test_lengths(self, length, reverse):
        check(triton_ssd.errors(length=length, heads=8, reverse=reverse))

    @pytest.mark.parametrize(("width", "states"), [(1, 1), (8, 7), (9, 8), (5, 17), (24, 5), (64, 72), (130, 3)])
    def test_sizes(self, width, states):
        check(triton_ssd.errors(heads=8, width=width, states=states))

    def test_groups_heads_and_batches(self):
        check(triton_ssd.errors(2, 66, 6, 9, 3, 10, extras=False, reverse=True))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype):
        check(triton_ssd.errors(length=130, width=16, states=16, dtype=dtype))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_float64(self, reverse):
        arguments = triton_ssd.inputs(2, 150, 4, 9, 2, 11)
        found, wanted = (triton_ssd.run(arguments, name, reverse) for name in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_a_float64_argument_is_not_rounded(self):
        """Like the definition, the form computes in float64 if one argument is float64."""
        x, dt, A, B, C, *_ = (x if x is None else x.detach() for x in triton_ssd.inputs(1, 20, 2, 8, 1, 8))
        arguments = [x.float(), dt, A, B.float(), C.float()]
        found, wanted = (ssd(*arguments, dt_softplus=True, backend=name) for name in ("fused", "reference"))
        assert torch.equal(found, wanted)

    @pytest.mark.parametrize("layout", ["sliced", "turned", "expanded"])
    def test_layouts(self, layout):
        """Arguments that are parts of larger tensors, or have other strides, are read in place or copied."""
        arguments = triton_ssd.inputs(2, 70, 4, 8, 2, 8, extras=False, dtype=torch.float32)[:5]

        def laid(x):
            if x.dim() == 1:
                return x
            if layout == "sliced":
                return torch.cat([x * math.nan, x, x * math.nan], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
            if layout == "turned":
                return x.transpose(1, -1).contiguous().transpose(1, -1)
            return x[:1].expand(2, *x.shape[1:])

        arguments = [laid(x.detach()).requires_grad_() for x in arguments]
        given = [*arguments, None, None, None]
        wanted, plain = triton_ssd.exact(given, False), triton_ssd.run(given, "reference", False)
        with poisoned():
            found = triton_ssd.run(given, "fused", False)
        check(limits(triton_ssd.NAMES, found, plain, wanted, sums=("A",)))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
    def test_what_is_not_finite_stays_so(self, name, value):
        """Where the definition has a finite number, infinity or none, the form has the same."""
        arguments = {n: x.detach() for n, x in zip(("x", "dt", "A", "B", "C"), triton_ssd.inputs(1, 70, 2, 9, 2, 9))}
        arguments = {n: x.float() for n, x in arguments.items()}
        arguments["dt"] = arguments["dt"].abs()
        arguments[name][(0, 66, 1, 0)[: arguments[name].dim()]] = value
        found, wanted = (ssd(**arguments, backend=backend) for backend in ("fused", "reference"))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_long_sequences_lose_no_digits(self):
        x, dt, A, B, C, *_ = triton_ssd.inputs(1, 4096, 2, 2, 1, 4, dtype=torch.float32)
        arguments = [x.detach() for x in (x, 8 * dt, A, B, C)]
        found = ssd(*arguments, dt_softplus=True, backend="fused")
        wanted = ssd(*(x.double() for x in arguments), dt_softplus=True, backend="reference")
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    def test_last_states(self):
        arguments = [x.detach() for x in triton_ssd.inputs(2, 70, 4, 9, 2, 9)[:5]]
        for reverse in (False, True):
            options = dict(dt_softplus=True, reverse=reverse, return_final_states=True)
            found, wanted = (ssd(*arguments, backend=name, **options) for name in ("fused", "reference"))
            torch.testing.assert_close(found, wanted)

    def test_nothing_to_do(self):
        assert triton_ssd.empty()


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparison must fail."""

    @pytest.mark.parametrize("helper", ["", "add_multiples", "add_dot", "dot", "multiply_all", "position"])
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        # The kernels' bodies run in Python, so their parts can be replaced.
        for name in ("forward", "backward"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
        whole = getattr(kernels, helper, None)
        if helper == "position":
            monkeypatch.setattr(kernels, helper, lambda step, length, reverse: step)
        elif helper:

            def broken(*arguments):
                found = whole(*arguments)
                return tuple(x * 0.9 for x in found) if isinstance(found, tuple) else found * 0.9

            monkeypatch.setattr(kernels, helper, broken)
        found = triton_ssd.errors(length=CHUNK + 2, heads=1, width=8, states=9, extras=False, reverse=True)
        failed = [name for name, (error, allowed) in found.items() if not error <= 2 * allowed]
        assert bool(failed) == bool(helper)


class TestOperator:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_first_state(self, reverse):
        draw = torch.Generator().manual_seed(0)
        x, state = torch.randn(2, 70, 4, 8, generator=draw), torch.randn(2, 4, 8, 5, generator=draw)
        B, C = (torch.randn(2, 70, 2, 5, generator=draw) for _ in range(2))
        arguments = x, torch.randn(2, 70, 4, generator=draw), -torch.rand(4, generator=draw) - 0.5, B, C
        options = dict(dt_softplus=True, reverse=reverse, return_final_states=True)
        found = ssd(*arguments, **options, initial_states=state, backend="fused")
        wide = (x.double() for x in arguments)
        wanted = ssd(*wide, **options, initial_states=state.double(), backend="reference")
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)

    def test_auto_takes_it(self):
        arguments = [x if x is None else x.detach() for x in triton_ssd.inputs(1, 9, 2, 72, 1, 72)]
        assert OPERATOR.why("auto", *arguments[:5]).name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = triton_ssd.inputs(1, 9, 2, 8, 1, 8, dtype=torch.float32)
        auto, portable = (triton_ssd.run(arguments, name, False) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable))
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            triton_ssd.run(arguments, "auto", False)

    def test_the_number_of_threads_changes_no_bit(self, monkeypatch):
        monkeypatch.setattr(fused_cpu, "_WORK", 1)
        before, results = torch.get_num_threads(), []
        arguments = triton_ssd.inputs(2, 150, 3, 24, 1, 9, dtype=torch.float32)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(triton_ssd.run(arguments, "fused", False))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_opcheck(self, reverse):
        triton_ssd.opcheck(reverse)

    @pytest.mark.long
    def test_compiles_without_a_break(self):
        torch._dynamo.reset()
        assert triton_ssd.compiled() == 0

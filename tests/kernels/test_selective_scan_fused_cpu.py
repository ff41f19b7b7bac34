"""The selective scan's CPU kernels are compared with the definition in float64, in memory poisoned with NaN."""

import importlib
import math
import os
import threading

import numpy as np
import pytest
import timm
import torch
from support import triton_scan
from support.processes import run_code
from support.triton_common import check

import terrazzo  # noqa: F401
from terrazzo.errors import BackendError
from terrazzo.kernels import selective_scan, use_backend
from terrazzo.kernels.numba_host import machine, threads
from terrazzo.kernels.triton_host import machine as triton_machine

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
kernels = importlib.import_module("terrazzo.kernels.selective_scan.fused_cpu_kernels")
WIDE = kernels.WIDE
OPERATOR = importlib.import_module("terrazzo.kernels.selective_scan.op").OPERATOR

pytestmark = pytest.mark.skipif(triton_machine.interpreting(), reason="Triton interprets in this process")


class TestKernels:
    @pytest.mark.parametrize("length", [1, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1, 2 * kernels.CHUNK + 9])
    def test_lengths(self, length):
        check(triton_scan.errors(length=length, channels=7))

    @pytest.mark.parametrize("states", [1, 2, 8, 15, 16, 70])
    @pytest.mark.parametrize("channels", [WIDE, WIDE + 1, 3 * WIDE - 1])
    def test_channels_and_states(self, channels, states):
        check(triton_scan.errors(length=70, channels=channels, states=states, leave=("z",)))

    @pytest.mark.parametrize(("height", "width"), [(5, 7), (7, 5), (1, 35), (35, 1), (11, 13)])
    @pytest.mark.parametrize("shared", [True, False])
    def test_orders(self, height, width, shared):
        options = dict(length=height * width, width=width, orders=(0, 1, 2, 3), channels=18, states=1)
        check(triton_scan.errors(shared=shared, merge=True, **options))

    @pytest.mark.parametrize("orders", [(2,), (3, 1), (2, 2, 2), (0, 3, 1, 2, 0)])
    def test_any_scans(self, orders):
        check(triton_scan.errors(length=35, width=7, orders=orders, channels=4, states=2, batch=3))

    @pytest.mark.parametrize("layout", ["packed", "sequences", "turned"])
    @pytest.mark.parametrize("leave", [(), ("D",), ("delta_bias",), ("z", "D", "delta_bias")])
    def test_layouts_and_what_is_left_out(self, layout, leave):
        check(triton_scan.errors(length=10, channels=9, batch=2, layout=layout, leave=leave))

    @pytest.mark.parametrize("length", [1, 7, kernels.CHUNK, kernels.CHUNK + 13])
    @pytest.mark.parametrize("orders", [(0,), (2,), (2, 0)])
    def test_sequences_are_read_in_place(self, length, orders):
        """The forward pass takes pieces of (B, K, D, L), as mamba_ssm's interface gives it, for whole vectors alone."""
        options = dict(length=length, orders=orders, channels=2 * WIDE, layout="sequences", batch=2)
        for shared in (True, False):
            check(triton_scan.errors(shared=shared, **options))
        check(triton_scan.errors(dtype="bfloat16", **options))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("merge", [True, False])
    def test_dtypes(self, dtype, merge):
        options = dict(orders=(0, 3), width=4, length=36, channels=5, shared=merge, merge=merge, leave=())
        check(triton_scan.errors(dtype=dtype, **options))

    @pytest.mark.parametrize("merge", [True, False])
    def test_float64(self, merge):
        arguments = triton_scan.inputs(2, 150, 2, 20, 3, shared=merge, leave=(), dtype=torch.float64)
        found, wanted = (triton_scan.run(arguments, (0, 3), 10, merge, backend=x) for x in ("fused", "reference"))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_without_softplus(self):
        check(triton_scan.errors(length=40, channels=9, softplus=False, leave=("z",)))

    def test_step_sizes_of_any_size(self):
        """For steps of softplus(N(0, 8)), some hold the state and some forget it; nothing overflows."""
        check(triton_scan.errors(length=70, channels=9, states=4, spread=8.0))

    def test_held_and_forgotten(self):
        held, forgotten = triton_scan.held()
        assert held == 0
        assert forgotten < 1e-6

    def test_what_is_not_a_number_stays_so(self):
        assert triton_scan.not_a_number()

    def test_infinity(self):
        """As in the definition, infinity fills the state, and a product with 0 is NaN."""
        x = torch.zeros(1, 1, 5)
        x[0, 0, 2] = math.inf
        one, two = torch.ones(1, 1, 5), torch.ones(1, 2, 5)
        A = torch.tensor([[-1.0, -200.0]])
        found, wanted = (selective_scan(x, one, A, two, two, backend=name) for name in ("fused", "reference"))
        torch.testing.assert_close(found, wanted, equal_nan=True)

    def test_nothing_to_do(self):
        shapes = [(0, 4, 1, 3), (1, 3, 2), (0, 4, 1, 2), (0, 4, 1, 2), (1, 3)]
        assert triton_scan.empty() == [(0, 4, 1, 3), (0, 4, 1, 3), *shapes, None, (1, 3)]


class TestMutations:
    """Break the kernels' arithmetic on purpose: the comparison must fail."""

    @pytest.mark.parametrize("helper", ["", "exp2", "softplus", "vanishing", "orders", "chunks", "turned"])
    def test_a_broken_piece_shows(self, monkeypatch, helper):
        fused_cpu = importlib.import_module("terrazzo.kernels.selective_scan.fused_cpu")
        for name in ("forward", "backward", "turn"):
            plain = getattr(kernels, name).py_func  # it runs in Python, so its parts can be replaced
            monkeypatch.setattr(kernels, name, plain)
        if helper in ("exp2", "softplus", "vanishing"):
            whole = getattr(kernels, helper)
            monkeypatch.setattr(kernels, helper, lambda *x: whole(*x) * np.float32(0.9))
        if helper == "orders":
            monkeypatch.setattr(fused_cpu, "_index", lambda orders, length, width: torch.arange(length).repeat(2, 1))
        if helper == "chunks":
            monkeypatch.setattr(kernels, "CHUNK", kernels.CHUNK - 1)
        options = dict(length=kernels.CHUNK + 2, channels=1, states=2, orders=(0, 3), width=2, merge=True)
        if helper == "turned":
            monkeypatch.setattr(kernels, helper, lambda vectors: vectors)
            options = dict(length=9, channels=WIDE, states=2, layout="sequences")
        found = triton_scan.errors(**options)
        broken = [name for name, (error, allowed) in found.items() if not error <= 2 * allowed]
        assert bool(broken) == bool(helper)


class TestThreads:
    def test_the_number_of_threads_changes_no_bit(self, monkeypatch):
        monkeypatch.setattr(importlib.import_module("terrazzo.kernels.selective_scan.fused_cpu"), "_WORK", 1)
        before = torch.get_num_threads()
        arguments = triton_scan.inputs(2, 150, 2, 70, 3, leave=(), dtype=torch.float32)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(triton_scan.run(arguments, (0, 3), 10))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    def test_two_python_threads_at_once(self):
        arguments = [triton_scan.inputs(1, 200, 1, 64, 4, dtype=torch.float32) for _ in range(2)]
        wanted = [triton_scan.run(x) for x in arguments]
        found = [[], []]

        def work(i):
            found[i] = [triton_scan.run(arguments[i]) for _ in range(20)]

        started = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(60)
        for i in range(2):
            assert len(found[i]) == 20
            for result in found[i]:
                assert all(torch.equal(a, b) for a, b in zip(result, wanted[i]) if a is not None)

    @pytest.mark.long
    def test_forked_workers_run_a_model(self):
        """The parent process uses its threads before a DataLoader forks four workers."""
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            model = timm.create_model("vmamba_tiny_s1l8", depths=(1, 1, 1, 1), embed_dim=16).eval()
            data = _Predictions(model)
            with torch.no_grad():
                wanted = [data[i] for i in range(8)]
                loader = torch.utils.data.DataLoader(data, num_workers=4, multiprocessing_context="fork", timeout=120)
                found = [x[0] for x in loader]
        finally:
            torch.set_num_threads(before)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b)

    def test_an_error_of_any_thread_is_raised(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)

        def work(i):
            if i % 2:
                raise ValueError(f"no {i}")

        try:
            with pytest.raises(ValueError, match="no "):
                threads.run(work, 6)
        finally:
            torch.set_num_threads(before)


class _Predictions(torch.utils.data.Dataset):
    """A model's outputs for random pictures; the process that asks for an output computes it."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 8

    @torch.no_grad()
    def __getitem__(self, i):
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(i))
        return self.model(image)[0]


class TestOperator:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_first_state(self, reverse):
        draw = torch.Generator().manual_seed(0)
        u, delta, state = (torch.randn(2, 9, n, generator=draw) for n in (40, 40, 5))
        B, C = (torch.randn(2, 5, 40, generator=draw) for _ in range(2))
        arguments = u, delta, -torch.rand(9, 5, generator=draw) - 0.5, B, C
        options = dict(delta_softplus=True, reverse=reverse, return_last_state=True)
        found = selective_scan(*arguments, **options, initial_state=state, backend="fused")
        wide = (x.double() for x in arguments)
        wanted = selective_scan(*wide, **options, initial_state=state.double(), backend="reference")
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)

    def test_auto_takes_it(self):
        x = torch.zeros(1, 9, 1, 4)
        choice = OPERATOR.why("auto", x, x, torch.zeros(1, 4, 2), torch.zeros(1, 9, 1, 2), torch.zeros(1, 9, 1, 2))
        assert choice.name == "fused"

    def test_without_numba_everything_works(self, monkeypatch):
        monkeypatch.setattr(machine, "has_numba", lambda: False)
        arguments = triton_scan.inputs(dtype=torch.float32)
        auto, portable = (triton_scan.run(arguments, backend=name) for name in ("auto", "portable"))
        assert all(torch.equal(a, b) for a, b in zip(auto, portable) if a is not None)
        with use_backend("fused"), pytest.raises(BackendError, match=r"needs the package numba.*\[cpu\]"):
            triton_scan.run(arguments, backend="auto")

    @pytest.mark.long
    @pytest.mark.parametrize("merge", [True, False])
    def test_opcheck(self, merge):
        triton_scan.opcheck(merge)

    @pytest.mark.long
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_compiles_without_a_break(self, dynamic):
        torch._dynamo.reset()
        assert triton_scan.compiled(dynamic) == 0

    @pytest.mark.long
    def test_numba_comes_at_the_first_call(self):
        code = (
            "import sys, torch, terrazzo.kernels as k, terrazzo.kernels.token_reduction; x = torch.zeros(1, 2, 8)\n"
            "assert 'numba' not in sys.modules\n"
            "k.selective_scan(x, x, -torch.ones(2, 1), torch.ones(1, 1, 8), torch.ones(1, 1, 8))\n"
            "assert 'numba' in sys.modules"
        )
        done = run_code(code)
        assert done.returncode == 0, done.stderr

    @pytest.mark.long
    def test_a_cache_that_cannot_be_written_costs_only_time(self, tmp_path):
        (tmp_path / "cache").write_text("a file in the place of the folder")
        code = (
            "import torch, terrazzo.kernels as k; x = torch.ones(1, 2, 8)\n"
            "from numba.core.caching import CacheImpl as c; c._locator_classes = c._locator_classes[:1]\n"
            "print(k.selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1], backend='fused')[0, 0, 1].item())"
        )
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path / "cache")}
        environment = {**os.environ, **environment}
        environment.pop("NUMBA_CACHE_DIR", None)
        done = run_code(code, env=environment)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(1 + math.exp(-1))
        assert "can be written, so each process compiles its CPU kernels" in done.stderr
        assert done.stderr.count("compiles CPU kernels for this processor") == 1

    @pytest.mark.long
    def test_a_full_disk_costs_only_time(self, tmp_path):
        code = (
            "import resource, signal, torch, terrazzo.kernels as k; x = torch.ones(1, 2, 8)\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "print(k.selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1], backend='fused')[0, 0, 1].item())"
        )
        done = run_code(code, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(1 + math.exp(-1))
        assert "could not be kept" in done.stderr

"""Vectors of CPU kernels, and functions of numbers, are compared with NumPy; threads share the work of a call."""

import importlib
import sys
import threading

import numpy as np
import pytest
import torch
from support.processes import run_code

from terrazzo.kernels.numba_host import openmp, threads
from terrazzo.kernels.numba_host.fused_constants import WIDE

numba = pytest.importorskip("numba", reason="needs the extra 'cpu'")
vectors = importlib.import_module("terrazzo.kernels.numba_host.fused_vectors")


class TestVectors:
    """Each operation, compiled, gives what its body gives."""

    def test_operations(self):
        integer = np.int32

        def run(x, y, out):
            store, load, spread = vectors.store, vectors.load, vectors.spread
            a, b = load(x, 3), load(y, 1)
            results = (
                a + b,
                a - b,
                a * b / (a + 3),
                vectors.larger(a, b),
                vectors.keep(a, 3, x[0]),
                spread(x, 5),
            )
            vectors.store_all(out, 0, 8, results)
            sums = vectors.add_products(vectors.zeros(x, 3), a, y, 2, 5)
            vectors.store_all(out, 48, 9, vectors.multiply_all(sums, b))
            two = vectors.add_products_of_two(vectors.zeros(x, 4), a, b, y, 0, 7, 1)
            vectors.store_two(out, 80, 120, 11, two)
            first = (load(x, 0), load(x, 7), load(x, 14), load(x, 21))
            rows = first + (load(x, 28), load(x, 35), load(x, 42), load(x, 49))
            vectors.store_all(out, 150, 8, vectors.turned(rows))
            store(out, 220, a)
            out[230], out[231] = vectors.largest_of(a), vectors.sum_of(b)
            wide, other = vectors.load_wide(x, 9), vectors.splat(x[2])
            store(out, 240, vectors.above(wide, other, 2 * wide, other))
            bits = vectors.bits_of(wide)
            store(out, 256, vectors.float_of(bits - ((bits >> integer(23)) << integer(23))))
            store(out, 272, vectors.with_lane(wide, 5, vectors.lane_of(wide, 3)))
            many = vectors.load_all(y, 0, 9, 3)
            vectors.store_all(out, 288, 8, vectors.add_multiples(many, a, x, 7))
            vectors.store_all(out, 312, 8, vectors.add_scaled(many, a, results[:3]))
            store(out, 336, vectors.add_dot(a, many, x, 2))
            store(out, 344, vectors.dot(a, many, x, 2, 11))
            pair = vectors.load_all_wide(y, 5, 17, 2)
            pair = vectors.add_multiples_apart(pair, wide, x, 3, 7)
            vectors.store_all(out, 352, 16, vectors.add_all(vectors.zeros_wide(x, 2), pair))

        generator = np.random.default_rng(0)
        x, y = (generator.standard_normal(60).astype(np.float32) for _ in range(2))
        y[4] = np.nan
        found, wanted = np.zeros(384, np.float32), np.zeros(384, np.float32)
        numba.njit(run)(x, y, found)
        run(x, y, wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def on_vectors(name, first=None):
    """A function of fused_maths, for arrays of any size; `first` names the function that gives its second argument."""
    maths = importlib.import_module("terrazzo.kernels.numba_host.fused_maths")
    load, store, function = vectors.load_wide, vectors.store, getattr(maths, name)
    if first is not None:
        second, begin = function, getattr(maths, first)
        function = numba.njit(lambda x: second(x, begin(x)))

    @numba.njit
    def run(x, out):
        for i in range(0, len(x), WIDE):
            store(out, i, function(load(x, i)))

    def call(x):
        x = np.concatenate([x, np.ones(-len(x) % WIDE, x.dtype)])
        out = np.empty_like(x)
        run(x, out)
        return out

    return call


class TestMaths:
    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_softplus(self, dtype):
        """Errors are within 4 units in the last place, and below the smallest float32 that has all its digits."""
        x = np.concatenate([np.linspace(-86, 30, 1_000_001), np.linspace(-1, 1, 100_001)]).astype(dtype)
        exact = np.logaddexp(0, x.astype(np.longdouble))
        error = np.abs(on_vectors("softplus", "vanishing")(x)[: len(x)] - exact)
        assert (error <= 4 * np.spacing(exact.astype(dtype))).all()
        special = np.array([np.nan, np.inf, -np.inf, -120, 1e30, -1e30], dtype)
        found = on_vectors("softplus", "vanishing")(special)[: len(special)]
        np.testing.assert_allclose(found, np.array([np.nan, np.inf, 0, 0, 1e30, 0], dtype), rtol=1e-6, atol=1e-37)

    def test_falling(self):
        """Errors are within 3 units in the last place; powers below the smallest float32 with all its digits are 0."""
        run = on_vectors("falling")
        x = np.concatenate([np.linspace(-87, 0, 1_000_001), np.linspace(-1, 0, 100_001)]).astype(np.float32)
        exact = np.exp(x.astype(np.float64))
        assert (np.abs(run(x)[: len(x)] - exact) <= 3 * np.spacing(exact.astype(np.float32))).all()
        special = np.array([np.nan, -np.inf, -1e30, -89, 0, -0.0], np.float32)
        found = run(special)[: len(special)]
        assert np.array_equal(found, np.array([np.nan, 0, 0, 0, 1, 1], np.float32), equal_nan=True)
        np.testing.assert_allclose(run(x.astype(np.float64))[: len(x)], exact, rtol=1e-15)

    def test_exp2_over_its_whole_range(self):
        """Errors are within 2 units in the last place, from the smallest number to infinity."""
        run = on_vectors("exp2")
        x = np.concatenate([np.linspace(-152, 128.5, 1_000_003), np.linspace(-1, 1, 100_001)]).astype(np.float32)
        out = run(x)[: len(x)]
        with np.errstate(over="ignore"):
            exact = np.exp2(x.astype(np.float64))
            rounded = exact.astype(np.float32)
        finite = np.isfinite(rounded)
        assert np.array_equal(np.isinf(out), ~finite)
        assert (np.abs(out[finite] - exact[finite]) <= 2 * np.spacing(rounded[finite])).all()
        special = np.array([np.nan, np.inf, -np.inf, -1e30, 1e30, 0], np.float32)
        out = run(special)[: len(special)]
        assert np.array_equal(out, np.array([np.nan, np.inf, 0, 0, np.inf, 1], np.float32), equal_nan=True)


class TestThreads:
    @pytest.fixture
    def three(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("reached", [True, False])
    def test_calls_run_at_the_same_time(self, monkeypatch, three, reached):
        """On PyTorch's threads, or on Python threads if these cannot be reached: calls wait for each other."""
        if not reached:
            monkeypatch.setattr(openmp, "run", lambda work, threads: False)
        barrier, seen = threading.Barrier(3), set()

        def kernel(i):
            barrier.wait(timeout=60)
            seen.add((i, threading.get_ident()))

        threads.run(kernel, 3)
        assert {i for i, _ in seen} == {0, 1, 2}
        assert len({thread for _, thread in seen}) == 3

    @pytest.mark.long
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch contains GNU's OpenMP on Linux alone")
    def test_another_packages_openmp_is_not_in_the_way(self, tmp_path):
        """scikit-learn brings a copy of its own, for example."""
        code = (
            "import ctypes, shutil, torch; from terrazzo.kernels.numba_host import openmp\n"
            "(path,) = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
            f"copy = shutil.copy(path, {str(tmp_path / 'libgomp-other.so.1')!r})\n"
            "ctypes.CDLL(copy)\n"
            "calls = []\n"
            "assert openmp.run(lambda: calls.append(1), 2) and len(calls) == 2"
        )
        done = run_code(code)
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch contains GNU's OpenMP on Linux alone")
    def test_pytorchs_threads_are_reached(self):
        code = (
            "import os, sys, torch, terrazzo; from terrazzo.kernels.numba_host import openmp\n"
            "calls = []\n"
            "assert openmp.run(lambda: calls.append(1), 2) and len(calls) == 2\n"
            "child = os.fork()\n"
            "if child == 0: os._exit(openmp.run(lambda: None, 2))\n"
            "assert os.waitpid(child, 0)[1] == 0, 'a forked process would wait for threads that it lacks'"
        )
        done = run_code(code)
        assert done.returncode == 0, done.stderr

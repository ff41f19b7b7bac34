"""The timers of benchmarks; the GPU's timers run on a fake GPU."""

import contextlib
import time
import types
from time import perf_counter

import pytest
import torch

from terrazzo.tools.inspect import timing

CPU = torch.device("cpu")


class Event:
    """A CUDA event of a device that works while the host waits."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    properties = types.SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def nap():
    time.sleep(0.005)


@pytest.mark.parametrize("kind", [timing.KernelTimer, timing.ThroughputTimer])
def test_timers_of_a_gpu(gpu, kind):
    timer = kind(CPU)
    for _ in range(2):
        assert 0.005 <= timer(nap) < 0.05


def test_a_call_is_queued_behind_reads_that_last_longer(gpu):
    timer = timing.KernelTimer(CPU)
    timer.reading = 0.001
    assert 8 <= timer._count(nap) <= 30
    assert timer._count(lambda: None) == 2


def test_a_steady_timer_times_the_second_of_two_calls():
    naps = [0.05, 0.005]
    assert 0.005 <= timing.SteadyTimer()(lambda: time.sleep(naps.pop(0))) < 0.05
    assert not naps


def test_turns():
    calls = []
    found = timing.interleaved({"a": lambda: calls.append("a"), "b": nap}, 0.01)
    assert calls == ["a"] * len(calls)
    assert len(calls) >= 5
    assert found["b"][0] <= found["b"][1] <= found["b"][2]
    assert found["a"][1] < found["b"][1]
    assert timing.interleaved({}) == {}


def test_what_fails_is_told_and_left_out():
    def fail(error):
        def function():
            raise error

        return function

    functions = {
        "good": lambda: 1,
        "wrong": lambda: 2,
        "memory": fail(torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
        "broken": fail(RuntimeError("one\ntwo")),
        "absent": fail(timing.Unavailable("too large")),
    }
    working, reasons = timing.attempt(functions, lambda found: "no" if found == 2 else None)
    assert list(working) == ["good"]
    assert reasons == {"wrong": "no", "memory": "out of memory", "broken": "RuntimeError: one", "absent": "too large"}


def test_copy_bandwidth():
    slow, middle, fast = timing.copy_bandwidth(CPU, 1 << 22)
    assert 1e8 < slow <= middle <= fast < 1e13

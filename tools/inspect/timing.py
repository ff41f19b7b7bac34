"""Timing functions against one another: on a CPU by its clock, on a GPU by events."""

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

FORWARD, TRAINING = "forward", "forward+backward"
Function = Callable[[], object]
Quantiles = tuple[float, float, float]


@dataclass(frozen=True)
class Plan:
    """How a benchmark should run.

    Attributes:
        device: where everything is measured.
        seconds: time for each figure.
        passes: any of `FORWARD` and `TRAINING`; empty for the benchmark's own choice.
        compiled: also measure under `torch.compile`; None leaves it to the benchmark.
        quick: fewer shapes.
    """

    device: torch.device
    seconds: float
    passes: tuple[str, ...] = ()
    compiled: bool | None = None
    quick: bool = False

    @property
    def compiles(self) -> bool:
        """Whether to measure under `torch.compile`; by default on a GPU."""
        return self.device.type == "cuda" if self.compiled is None else self.compiled


class Unavailable(Exception):
    """Raised for a peer that cannot take part; the message says why."""


class HostTimer:
    """Seconds of one call by the host's clock: for devices that finish their work before the call returns."""

    def __call__(self, function: Function) -> float:
        begin = perf_counter()
        function()
        return perf_counter() - begin


class SteadyTimer(HostTimer):
    """Seconds of the second of two calls: for functions with their own threads, which spin when they are done.

    The first call outlasts the threads and cache contents that the previous function left.
    """

    def __call__(self, function: Function) -> float:
        function()
        return super().__call__(function)


class _EventTimer:
    """The common part of both ways of timing on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _elapsed(self) -> float:
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


class KernelTimer(_EventTimer):
    """Seconds of one call's kernels on a GPU, with none of its inputs in the cache.

    A buffer several times the cache's size is read first, often enough for the host to queue the call meanwhile: a
    short call would otherwise be timed at the speed of Python. Writing to the buffer would work, too, but then the call
    would wait for the cache to write it back.
    """

    _MOST = 64

    def __init__(self, device: torch.device):
        super().__init__(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.zeros(max(cache, 32 << 20), device=device)
        self.reads: dict[Function, int] = {}
        self._read()
        self.reading = min(self._read() for _ in range(3))

    def _read(self) -> float:
        with torch.cuda.device(self.device):
            self.begin.record()
            self.buffer.sum()
            self.end.record()
        return self._elapsed()

    def _count(self, function: Function) -> int:
        """How many reads last longer than the host needs to queue the call."""
        host = math.inf
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            begin = perf_counter()
            function()
            host = min(host, perf_counter() - begin)
        torch.cuda.synchronize(self.device)
        return min(self._MOST, 1 + math.ceil(1.5 * host / self.reading))

    def __call__(self, function: Function) -> float:
        if function not in self.reads:
            self.reads[function] = self._count(function)
        with torch.cuda.device(self.device):
            for _ in range(self.reads[function]):
                self.buffer.sum()
            self.begin.record()
            function()
            self.end.record()
        return self._elapsed()


class ThroughputTimer(_EventTimer):
    """Seconds of a call among calls back to back, as a server or a training makes them: the host's work counts."""

    _LENGTH = 0.05

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.counts: dict[Function, int] = {}

    def _timed(self, function: Function, count: int) -> float:
        with torch.cuda.device(self.device):
            function()  # the queue is not empty when the clock starts
            self.begin.record()
            for _ in range(count):
                function()
            self.end.record()
        return self._elapsed() / count

    def __call__(self, function: Function) -> float:
        if function not in self.counts:
            self.counts[function] = max(1, math.ceil(self._LENGTH / self._timed(function, 1)))
        return self._timed(function, self.counts[function])


def kernel_timer(device: torch.device) -> Callable[[Function], float]:
    """The timer for operators."""
    return KernelTimer(device) if device.type == "cuda" else HostTimer()


def throughput_timer(device: torch.device) -> Callable[[Function], float]:
    """The timer for models."""
    return ThroughputTimer(device) if device.type == "cuda" else HostTimer()


def interleaved(
    functions: Mapping[str, Function],
    seconds: float = 1.0,
    timer: Callable[[Function], float] | None = None,
    turns: int = 5,
) -> dict[str, Quantiles]:
    """Time functions in turns, so that a noisy machine disturbs all equally. They must be warm.

    Args:
        functions: by name.
        seconds: for each function.
        timer: gives the seconds of a call; the host's clock by default.
        turns: the least number of turns, at least 2.

    Returns:
        Per name p20, p50 and p80 in seconds.
    """
    if not functions:
        return {}
    timer = timer or HostTimer()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = perf_counter() + seconds * len(functions)
    while perf_counter() < end or len(next(iter(times.values()))) < turns:
        for name, function in functions.items():
            times[name].append(timer(function))
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> Quantiles:
    """p20, p50 and p80, none beyond the values themselves."""
    cuts = statistics.quantiles(values, n=5)
    return max(cuts[0], min(values)), statistics.median(values), min(cuts[3], max(values))


class Late:
    """A function that is built at its first call, so that a failure to build is handled like a failure to run."""

    def __init__(self, make: Callable[[], Function]):
        self.make, self.function = make, None

    def __call__(self) -> object:
        self.function = self.function or self.make()
        return self.function()


def attempt(
    functions: Mapping[str, Function], fault: Callable[[object], str | None] = lambda result: None
) -> tuple[dict[str, Function], dict[str, str]]:
    """Call every function twice, which warms and compiles it.

    Args:
        functions: by name.
        fault: given what a function returned, says what is wrong with it, or None.

    Returns:
        The functions that work, and for each of the others the reason in one line.
    """
    working, reasons = {}, {}
    for name, function in functions.items():
        try:
            function()
            reason = fault(function())
        except Exception as error:  # whatever goes wrong in a peer, the others are measured
            reason = reason_of(error)
        if reason is None:
            working[name] = function
        else:
            reasons[name] = reason
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return working, reasons


def reason_of(error: Exception) -> str:
    """Why something cannot be measured, in one line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else "no message"
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def copy_bandwidth(device: torch.device, size: int | None = None) -> Quantiles:
    """Bytes per second that a large copy on a device reads and writes, together: p20, p50, p80.

    Args:
        size: bytes to copy; by default far more than a cache holds.
    """
    if size is None:
        size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else 64 << 20
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = kernel_timer(device)

    def copy() -> None:
        target.copy_(source)

    copy()
    slow, middle, fast = quantiles([2 * size / timer(copy) for _ in range(15)])
    return slow, middle, fast

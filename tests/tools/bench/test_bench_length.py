"""`terrazzo bench length`: figures by the number of tokens, each from a process of its own."""

import faulthandler
import math
import multiprocessing
import os
import signal

import pytest
import torch

from terrazzo.tools import processes, results
from terrazzo.tools.bench.exponents import MACS
from terrazzo.tools.bench.length import benchmark, probe
from terrazzo.tools.bench.length.benchmark import MEMORY, growth, table
from terrazzo.tools.bench.length.probe import OUT_OF_MEMORY, Found
from terrazzo.tools.bench.length.subject import subject
from terrazzo.tools.inspect.timing import FORWARD, TRAINING


def made_up(name, length, device, seconds):
    """Softmax grows with the square, others with the length; 400 tokens do not fit for the hedgehog."""
    if (name, length) == ("hedgehog", 400):
        return Found({}, {}, OUT_OF_MEMORY)
    time = 1e-6 * length ** (2 if name == "softmax" else 1)
    return Found({FORWARD: (time,) * 3, TRAINING: (3 * time,) * 3}, dict.fromkeys(MEMORY, 2.0**20 * length))


def test_rows_exponents_and_what_did_not_fit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "found", made_up)
    out = tmp_path / "rows.csv"
    arguments = ("hedgehog", "--lengths", 64, 100, 256, 400, "--device", "cpu", "--out", out)
    done = run("bench", "length", *arguments)
    assert done.exit_code == 0, done.output
    rows = results.read(out)
    figures = benchmark._figures(rows)
    assert list(figures["hedgehog", TRAINING]) == [64, 100, 256, 400]
    assert math.isnan(figures["hedgehog", TRAINING][400])
    assert figures["softmax", TRAINING][400] == pytest.approx(3 * 0.4**2 * 1e3)
    assert figures["hedgehog", MACS][400] > 0
    head, lines = growth(rows)
    exponents = {line[0]: dict(zip(head, line)) for line in lines}
    assert exponents["hedgehog"][TRAINING] == exponents["hedgehog"][MEMORY[FORWARD]] == "1.00"
    assert exponents["softmax"][FORWARD] == "2.00"
    assert 1 < float(exponents["softmax"][MACS]) < 2
    head, lines = table(rows, {("hedgehog", 400): OUT_OF_MEMORY})
    (lost,) = (line for line in lines if line[-1])
    assert lost[:2] == ("hedgehog", "400")
    assert lost[-1] == OUT_OF_MEMORY
    (first,) = (dict(zip(head, line)) for line in lines if line[:2] == ("softmax", "100"))
    assert first["of hedgehog"] == "100.00 x"
    assert OUT_OF_MEMORY in done.output


def test_what_would_take_too_long_stays_in_the_table(run, monkeypatch):
    monkeypatch.setattr(benchmark, "found", made_up)
    done = run("bench", "length", "softmax", "--lengths", 64, 10000, "--most", 10, "--device", "cpu")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.output.splitlines() if line.split()[:2] == ["softmax", "10000"])
    assert "one call would take about 300 s; see --most" in line


def test_figures_of_a_process():
    """The function that runs in the process."""
    found = probe._measured("hedgehog", 64, "cpu", torch.get_num_threads(), 0.01)
    assert found.reason is None
    assert 0 < found.times[FORWARD][1] < found.times[TRAINING][1]
    assert set(found.memory) == set(MEMORY)
    told = probe._measured("hedgehog", 64, "cuda:99", torch.get_num_threads(), 0.01)
    assert told.reason
    assert not told.times


def crash():
    faulthandler.disable()  # pytest's report of a crash would look like a failure
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), OUT_OF_MEMORY),  # as Linux does when the memory is full
        (crash, "the process ended with signal 11 (SIGSEGV)"),
        (lambda: os._exit(3), "the process ended with exit code 3"),
    ],
)
def test_a_process_that_dies_is_an_answer(monkeypatch, end, reason):
    """It is forked here, which is quicker."""
    monkeypatch.setattr(processes, "context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(probe, "_measured", lambda *given: end())
    assert probe.found("hedgehog", 64, torch.device("cpu"), 0.01) == Found({}, {}, reason)


@pytest.mark.slow
def test_a_process_of_the_command():
    """It is started as the command starts it, and its answer comes back."""
    one = probe.found("hedgehog", 64, torch.device("cpu"), 0.01)
    assert one.reason is None
    assert one.times[FORWARD][1] > 0


def test_grids():
    assert subject("softmax", 1024).size == (32, 32)
    assert subject("softmax", 2048).size == (32, 64)
    assert subject("vit_tiny_patch16_224", 64).size == (128, 128)
    assert subject("resnet18", 256).size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("butter",), "no model is called 'butter'"),
        (("softmax", 1024), "1024 is neither a model nor a mixer; put --lengths in front"),
        (("hedgehog,size=3",), "'hedgehog' has no options, got size"),
        (("softmax", "--lengths", 2), "'--lengths': 2 is not in the range x>=4"),
        (("softmax", "--lengths", 64, 2), "a length must be at least 4 tokens, got 2"),
        (("--lengths", 64), "Missing argument 'MODEL...'"),
        (("--lengths", 64, 128), "name at least one model or mixer"),
    ],
)
def test_refusals(refused, arguments, words):
    assert words in refused("bench", "length", *arguments)

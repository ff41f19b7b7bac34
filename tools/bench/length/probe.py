"""Measuring one model at one number of tokens, in a process of its own."""

import contextlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from terrazzo.tools.bench.length.subject import build, subject
from terrazzo.tools.inspect.memory import PeakMemory
from terrazzo.tools.inspect.timing import FORWARD, TRAINING, Quantiles, interleaved, reason_of, throughput_timer
from terrazzo.tools.processes import ProcessEnded, alone

TURNS = 5
OUT_OF_MEMORY = "out of memory"
_KILLED = -9
"""The exit code of a process that the system ends for lack of memory: SIGKILL, which a process cannot catch."""
_NO_ROOM = ("can't allocate memory", "not enough memory")  # PyTorch's words for a CPU


class Found(NamedTuple):
    """The seconds of both passes and the bytes at their peaks by pass, or why there are none."""

    times: dict[str, Quantiles]
    memory: dict[str, float | None]
    reason: str | None = None


def found(name: str, length: int, device: torch.device, seconds: float) -> Found:
    """Measure in a new process; a process that the system kills has run out of memory."""
    try:
        return alone(_measured, name, length, str(device), torch.get_num_threads(), seconds)
    except ProcessEnded as ended:
        return Found({}, {}, OUT_OF_MEMORY if ended.code == _KILLED else str(ended))


def _measured(name: str, length: int, device: str, threads: int, seconds: float) -> Found:
    # If the system must end a process for lack of memory, it should be this one.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    where = torch.device(device)
    try:
        what = subject(name, length)
        model = build(what).to(where)
        image = torch.randn(1, what.channels, *what.size, device=where)
        passes = {FORWARD: partial(_forward, model, image), TRAINING: partial(_both, model, image)}
        memory = {}
        for kind, function in passes.items():
            function()  # compiles kernels
            with PeakMemory(where) as peak:
                function()
            memory[kind] = peak.bytes
        return Found(interleaved(passes, seconds, throughput_timer(where), TURNS), memory)
    except Exception as error:  # whatever goes wrong, other models and lengths are measured
        said = str(error)
        return Found({}, {}, OUT_OF_MEMORY if any(words in said for words in _NO_ROOM) else reason_of(error))


@torch.no_grad()
def _forward(model: nn.Module, image: torch.Tensor) -> None:
    model.forward_features(image)


def _both(model: nn.Module, image: torch.Tensor) -> None:
    model.forward_features(image).square().mean().backward()
    model.zero_grad()

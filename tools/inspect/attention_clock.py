"""How long a model's attention modules take within its forward passes."""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import nn

from terrazzo.tools.inspect.timing import Function, throughput_timer


class AttentionClock:
    """Measures the time between the beginning and the end of modules, projections included.

    Args:
        modules: each runs once in a forward pass.
        device: where they are.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.count = len(modules)
        self.marks: list = []
        for module in modules:
            module.register_forward_pre_hook(self._mark)
            module.register_forward_hook(self._mark)

    def _mark(self, *given: object) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self.marks.append(perf_counter())

    def take(self) -> float:
        """Seconds per forward pass since the last call of this method."""
        marks, self.marks = self.marks, []
        pairs = list(zip(marks[::2], marks[1::2]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            total = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        else:
            total = sum(end - begin for begin, end in pairs)
        return total * self.count / max(1, len(pairs))


class AttentionTimer:
    """A timer for models, as `throughput_timer`; it remembers attention's time in each turn.

    Args:
        clocks: by the function that calls the clock's model.
        projections: by function, clocks of the linear layers inside of these modules.

    Attributes:
        attention, projections: seconds of each turn, by function.
    """

    def __init__(
        self,
        device: torch.device,
        clocks: dict[Function, AttentionClock],
        projections: dict[Function, AttentionClock],
    ):
        self.timer = throughput_timer(device)
        self.clocks, self.linear = clocks, projections
        self.attention: dict[Function, list[float]] = {function: [] for function in clocks}
        self.projections: dict[Function, list[float]] = {function: [] for function in clocks}

    def __call__(self, function: Function) -> float:
        self.clocks[function].take()
        self.linear[function].take()
        seconds = self.timer(function)
        self.attention[function].append(self.clocks[function].take())
        self.projections[function].append(self.linear[function].take())
        return seconds

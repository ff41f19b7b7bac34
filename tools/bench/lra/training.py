"""One recipe for every network: AdamW for a time, with the rate after the part of the time that has passed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.errors import NonFiniteError
from terrazzo.tools.bench.lra.tasks import Split, Task

RATE, DECAY, WARM_UP = 1e-3, 0.05, 0.05
"""Learning rate, weight decay, and the part of the time in which the rate rises; it falls along a cosine."""


@dataclass(frozen=True)
class Budget:
    """What each network gets: seconds of training steps, examples of a step, a seed for weights and order."""

    seconds: float
    batch: int
    seed: int


def rate(part: float) -> float:
    """The learning rate after a part of the time."""
    return RATE * min(1.0, part / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def train(
    network: nn.Module, task: Task, data: Split, budget: Budget, device: torch.device, told: Callable[[float], None]
) -> int:
    """Train a network in place, and return the number of steps.

    A step in front does not count: it compiles kernels, and leaves the weights as they are.

    Args:
        told: is told the part of the time that has passed.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    order = torch.Generator().manual_seed(budget.seed)
    decayed = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
    network.train()
    batches = _batches(len(data.targets), budget.batch, order)
    _loss(network, task, data, next(batches), device).backward()
    steps, begin, part = 0, perf_counter(), 0.0
    while part < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(part)
        optimizer.zero_grad()
        loss = _loss(network, task, data, next(batches), device)
        loss.backward()
        optimizer.step()
        steps += 1
        if not math.isfinite(value := loss.item()):
            raise NonFiniteError(f"the loss is {value} at step {steps}")
        part = (perf_counter() - begin) / budget.seconds
        told(min(part, 1.0))
    return steps


def _batches(count: int, size: int, order: torch.Generator):
    """Indices of batches, epoch after epoch, each in another order."""
    while True:
        yield from torch.randperm(count, generator=order).split(size)


def _loss(network: nn.Module, task: Task, data: Split, which: torch.Tensor, device: torch.device) -> torch.Tensor:
    outputs = network(task.encoded(data.inputs[which].to(device)))
    return F.cross_entropy(outputs, data.targets[which].to(device))


@torch.no_grad()
def evaluate(network: nn.Module, task: Task, data: Split, batch: int, device: torch.device) -> dict[str, float]:
    """The scores of a split in percent."""
    network.eval()
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, len(data.targets), batch):
        which = slice(start, start + batch)
        part = Split(*(None if x is None else x[which] for x in (data.inputs, data.targets, data.instances)))
        outputs = network(task.encoded(part.inputs.to(device))).cpu()
        for name, value in task.scores(outputs, part).items():
            sums[name] = sums.get(name, 0) + value
    count = len(data.targets)
    return {
        name: 100 * float(value[0] / (value[1] if len(value) > 1 else count)) if value.sum() else 0.0
        for name, value in sums.items()
    }

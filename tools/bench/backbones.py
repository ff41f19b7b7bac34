"""Classifiers end to end: a family's model against timm models. The entries are in families.py.

Weights are random. Images and weights are channels_last, because convolutional models are fastest in it and others are
no slower. On a CPU everything is float32; on a GPU inference runs with bfloat16 weights, and training under autocast.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.families import FAMILIES, Family, Images
from terrazzo.tools.bench.verdicts import verdict
from terrazzo.tools.inspect.timing import (
    FORWARD,
    TRAINING,
    Function,
    Late,
    Plan,
    attempt,
    interleaved,
    throughput_timer,
)
from terrazzo.tools.models import pretrained_cfg

EAGER, COMPILED = "eager", "compiled"
STEP = "training step"
"""Metric: forward, backward and AdamW."""


@dataclass(frozen=True)
class Case:
    """A batch of images and one way of running models on it."""

    family: str
    images: Images
    dtype: torch.dtype
    mode: str
    metric: str

    @property
    def shape(self) -> str:
        return f"{self.images.batch}x3x{self.images.height}x{self.images.width}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype_name}, {self.mode}, {self.metric}"

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        found = (row.what, row.shape, row.dtype, row.backend, row.metric)
        return found == (self.family, self.shape, self.dtype_name, self.mode, self.metric)


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured for a family on the plan's device: by default the forward pass, and a CPU's training steps."""
    family = FAMILIES[name]
    gpu = plan.device.type == "cuda"
    images, few = (family.gpu, 2) if gpu else (family.cpu, 1)
    dtype = torch.bfloat16 if gpu else torch.float32
    modes = (EAGER, COMPILED) if plan.compiles else (EAGER,)
    batches = [*itertools.product(images[:few] if plan.quick else images, plan.passes or (FORWARD,))]
    if not (gpu or plan.quick or plan.passes):
        batches += [(batch, STEP) for batch in family.training]
    return [Case(name, batch, dtype, mode, metric) for batch, metric in batches for mode in modes]


def _build(name: str, images: Images, **arguments) -> nn.Module:
    """A model for these images; a model for a single size is built for their size."""
    sized = {"img_size": (images.height, images.width)} if pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, **sized, **arguments)


def _tensors(found: torch.Tensor | Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Logits alone, or maps."""
    return [found] if isinstance(found, torch.Tensor) else found


def _infer(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def _train(model: nn.Module, weights: list[nn.Parameter], images: torch.Tensor, dtype: torch.dtype):
    """Gradients of every weight."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = sum(x.float().square().mean() for x in _tensors(model(images)))
    return torch.autograd.grad(loss, weights)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> torch.Tensor:
    """A training step in float32, and its loss."""
    optimizer.zero_grad()
    loss = sum(x.square().mean() for x in _tensors(model(images)))
    loss.backward()
    optimizer.step()
    return loss


def _function(name: str, case: Case, plan: Plan) -> Function:
    """What is timed: one call of a model on random images."""
    training = case.metric in (TRAINING, STEP)
    placed = {"device": plan.device, "memory_format": torch.channels_last}
    dtype = torch.float32 if training else case.dtype
    name, arguments = FAMILIES[case.family].model_of(name)
    model = _build(name, case.images, **arguments).train(training).to(dtype=dtype, **placed)
    images = torch.randn(case.images.batch, 3, case.images.height, case.images.width).to(dtype=dtype, **placed)
    run = torch.compile(model, dynamic=False) if case.mode == COMPILED else model
    if not training:
        return partial(_infer, run, images)
    if case.metric == STEP:
        return partial(_step, run, torch.optim.AdamW(model.parameters(), lr=1e-6), images)
    return partial(_train, run, list(model.parameters()), images, case.dtype)


def _fault(found: torch.Tensor | Iterable[torch.Tensor]) -> str | None:
    return None if all(x.isfinite().all() for x in _tensors(found)) else "its result is not finite"


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Time every model on a case.

    Returns:
        The rows, and a reason for each model without rows.
    """
    family = FAMILIES[case.family]
    if case.mode == COMPILED:
        torch.compiler.reset()  # otherwise a model would run uncompiled after as many shapes as Dynamo caches
    functions, reasons = {}, {}
    for name in (family.model, *family.peers):
        # One model after the other, so that one that does not fit leaves room for the next.
        made, wanting = attempt({name: Late(partial(_function, name, case, plan))}, _fault)
        functions |= made
        reasons |= wanting
    times = interleaved(functions, plan.seconds, throughput_timer(plan.device))
    about = results.about(plan.device, "timm", *(("triton",) if plan.device.type == "cuda" else ()))
    rows = [
        results.Row(
            case.family,
            name,
            case.shape,
            case.dtype_name,
            case.mode,
            case.metric,
            "ms",
            *(1e3 * t for t in times[name]),
            *about,
        )
        for name in times
    ]
    return rows, reasons


def _family(rows: list[results.Row]) -> Family:
    if not rows or rows[0].what not in FAMILIES:
        raise InputError(f"these rows belong to none of the measured families: {', '.join(FAMILIES)}")
    return FAMILIES[rows[0].what]


def _times(rows: list[results.Row]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Milliseconds by model, by shape, dtype, mode and metric."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.shape, row.dtype, row.backend, row.metric), {})[row.variant] = row.p50
    return found


def _per_second(shape: str, time: float | None) -> str:
    """Images per second, given the milliseconds of a batch."""
    return "not run" if time is None else f"{1e3 * int(shape.split('x')[0]) / time:.4g}"


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: our time and images per second, and how many times as long the peers take."""
    family = _family(rows)
    lines = []
    for (shape, dtype, mode, metric), times in _times(rows).items():
        ours = times.get(family.model)
        ratios = (results.ratio(times.get(peer), ours) for peer in family.peers)
        lines.append(
            (f"{shape}, {dtype}, {mode}", metric, results.milliseconds(ours, 1), _per_second(shape, ours), *ratios)
        )
    head = ("images", "pass", f"{family.model}, ms", "images/s", *(f"{peer} takes" for peer in family.peers))
    return head, lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """The targets for this type of device, and whether they are met, a line for each mode."""
    family = _family(rows)
    found = _times(rows)
    lines = []
    for target in family.targets:
        if target.device != device:
            continue
        for mode in dict.fromkeys(key[2] for key in found):
            ratios = {
                f"{shape}, {dtype}": times[family.model] / times[target.peer]
                for (shape, dtype, its_mode, metric), times in found.items()
                if (its_mode, metric) == (mode, FORWARD) and {family.model, target.peer} <= times.keys()
            }
            unit = f"x the time of {target.peer}"
            if target.throughput:
                ratios = {case: 1 / ratio for case, ratio in ratios.items()}
                unit = f"x the images/s of {target.peer}"
            lines.append(verdict(f"{family.model}, {mode}", ratios, target.bound, not target.throughput, unit))
    return lines

"""Token reducers at equal multiply-adds: what each of them gives for the same cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from terrazzo.backbones.reducers import reducer_class, reducers
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.drift import AGREEMENT, DRIFT, MAP, drift, passes, seen
from terrazzo.tools.bench.matching import LastMap, Matcher
from terrazzo.tools.inspect.timing import FORWARD, interleaved, throughput_timer
from terrazzo.tools.mechanisms import DENSE, Mechanism, of_reducer, on_meta, read_reducer

WHAT = "reducers"
MACS, SHARE = "multiply-adds", "wanted share"
BASELINES = ("pool", "evit,fuse=False")
"""Uniform pooling and Top-K, which every method must beat."""


def named(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with fixed options: the baselines, and those that a user names; "all" means every method.

    Raises:
        InputError: No method has a name, or a text has another form than NAME[,KEY=VALUE...].
    """
    texts = [name for text in texts for name in (reducers() if text == "all" else (text,))]
    found = [read_reducer("--methods", text) for text in (*BASELINES, *texts)]
    for name, _ in found:
        reducer_class(name)
    return [pair for place, pair in enumerate(found) if pair not in found[:place]]


@dataclass(frozen=True)
class Contender:
    """A method with the options that were found for a share of the multiply-adds."""

    mechanism: Mechanism
    share: float
    macs: float


def contenders(
    model: nn.Module, size: tuple[int, int], texts: Sequence[str], shares: Sequence[float], maps: bool
) -> tuple[list[Contender], list[str]]:
    """The unreduced model, then every method at every share; and a line for each method that cannot reach a share.

    Args:
        model: a plain ViT of timm.
        size: (H, W) of the images.
        texts: see `named`.
        shares: parts of the multiply-adds.
        maps: see `Matcher`.
    """
    matcher = Matcher(on_meta(model), size, maps)
    found, wanting = [Contender(DENSE, 1.0, matcher.whole)], []
    for share in shares:
        for method, fixed in named(texts):
            try:
                options, reached = matcher.options(method, fixed, share)
            except InputError as error:
                wanting.append(f"{of_reducer(method, **fixed).name} at {share:.0%}: {error}")
            else:
                found.append(Contender(of_reducer(method, **options), share, reached * matcher.whole))
    return found, wanting


def measured(
    model: nn.Module,
    name: str,
    found: Sequence[Contender],
    inputs: torch.Tensor,
    batches: Sequence[int],
    seconds: float,
    maps: bool,
    done: Callable[[], None],
) -> list[results.Row]:
    """Rows of every contender: its cost, its drift from the model, and times, measured in turns.

    Args:
        name: of the model.
        inputs: pictures (B, 3, H, W), to compare features on.
        batches: numbers of images whose time is measured.
        seconds: time for each figure.
        maps: whether the pass that gives the last map is timed, and not the pass that classifies.
        done: is called after each contender.
    """
    rows, about = [], results.about(inputs.device, "timm")
    models = {contender.mechanism.name: contender.mechanism.on(model) for contender in found}

    def add(text: str, count: int, metric: str, unit: str, figures: tuple[float, float, float]) -> None:
        shape = "x".join(map(str, (count, *inputs.shape[1:])))
        rows.append(results.Row(WHAT, name, shape, "float32", text, metric, unit, *figures, *about))

    own = seen(model, inputs)
    for contender in found:
        text = contender.mechanism.name
        add(text, 1, SHARE, "1", (contender.share,) * 3)
        add(text, 1, MACS, "1", (contender.macs,) * 3)
        for metric, value in drift(own, seen(models[text], inputs)).items():
            add(text, len(inputs), metric, "1", (value,) * 3)
        done()
    for batch in batches:
        calls = passes({text: LastMap(model) if maps else model for text, model in models.items()}, inputs, batch)
        for text, times in interleaved(calls, seconds, throughput_timer(inputs.device)).items():
            add(text, batch, FORWARD, "ms", tuple(1e3 * time for time in times))
    return rows


def table(rows: Sequence[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: a line for each method and share, in the order of the rows."""
    times = {(row.backend, row.shape): row.p50 for row in rows if row.metric == FORWARD}
    facts = {(row.backend, row.metric): row.p50 for row in rows if row.metric != FORWARD}
    shapes = list(dict.fromkeys(row.shape for row in rows if row.metric == FORWARD))
    agree = any(row.metric == AGREEMENT for row in rows)
    lines = []
    for text in dict.fromkeys(row.backend for row in rows):
        line = [f"{facts[text, SHARE]:.0%}", text, f"{facts[text, MACS] / 1e9:.2f}", f"{facts[text, MAP]:.4f}"]
        line += [f"{facts[text, DRIFT]:.3f}"] + ([f"{facts[text, AGREEMENT]:.0%}"] if agree else [])
        for shape in shapes:
            time = times[text, shape]
            line += [f"{1e3 * int(shape.split('x')[0]) / time:.4g}", f"{times[DENSE.name, shape] / time:.2f} x"]
        lines.append(tuple(line))
    heads = (part for shape in shapes for part in (f"images/s, {shape.split('x')[0]} at once", "of unreduced"))
    return ("share", "method", "MACs, G", MAP, DRIFT, *([AGREEMENT] if agree else []), *heads), lines

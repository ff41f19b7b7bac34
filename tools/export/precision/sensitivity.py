"""Which layers tolerate a lower precision: the error of each layer, and which must stay in float32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from torch import Tensor

from terrazzo.tools.console import progress
from terrazzo.tools.export.precision.half import all_nodes
from terrazzo.tools.export.precision.low import Precision, layers

# Values that one run returns; all values of a large model at once would not fit in memory.
_AT_ONCE = 48


@dataclass(frozen=True)
class Lowered:
    """A graph with as many layers in lower precision as the loss allows.

    Attributes:
        model: the graph.
        precision: "fp16" or "int8".
        loss: what the lower precision costs, in the unit of the limit.
        passed: whether that is within the limit.
        kept: layers that stay in float32, the most sensitive first.
        errors: for each layer, the error of its values, including errors from earlier layers: rms of the difference to
            float32 / rms.
        alone: for each layer, the error of the outputs if only this layer is in lower precision; empty if no layer had
            to stay.
    """

    model: onnx.ModelProto
    precision: str
    loss: float
    passed: bool
    kept: tuple[str, ...]
    errors: Mapping[str, float]
    alone: Mapping[str, float] = field(default_factory=dict)


def lower(
    precision: Precision,
    samples: Sequence[tuple[Tensor, ...]],
    loss: Callable[[onnx.ModelProto], float],
    limit: float,
) -> Lowered:
    """Lower all layers, or all but the 1, 2, 4, ... most sensitive: the fewest that keep the loss within its limit.

    Args:
        precision: the lower precision of the graph.
        samples: inputs to compare values on, one tuple per run.
        loss: the cost of a graph, such as points of a metric; it is called with graphs that `Precision.measurable`
            makes.
        limit: the largest loss to accept.
    """
    model, kept, alone = precision.measurable(), (), {}
    figure = loss(model)
    if not figure <= limit:
        alone = lowered_alone(precision, samples)
        ranking = sorted(alone, key=alone.get, reverse=True)
        count = 1
        while not figure <= limit and count < len(ranking):
            kept = tuple(ranking[:count])
            model = precision.measurable(kept)
            figure = loss(model)
            count *= 2
    errors = layer_errors(precision, model, samples)
    return Lowered(precision.lower(kept), precision.name, figure, figure <= limit, kept, errors, alone)


def output_error(precision: Precision, samples: Sequence[tuple[Tensor, ...]]) -> Callable[[onnx.ModelProto], float]:
    """A loss without data: the mean relative error, 0..1, of the values that layers pass to the rest of the graph."""
    names = frontier(precision.model)
    expected = [values(precision.model, names, sample) for sample in samples]

    def loss(model: onnx.ModelProto) -> float:
        found = (values(model, names, sample) for sample in samples)
        errors = [_error(mine[name], theirs[name]) for mine, theirs in zip(expected, found) for name in names]
        return float(np.mean([min(error, 1.0) for error in errors]))

    return loss


def lowered_alone(precision: Precision, samples: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
    """For each layer, `output_error` of the graph with only this layer in lower precision."""
    loss, errors = output_error(precision, samples), {}
    with progress("layers alone") as bar:
        bar.update(bar.task_ids[0], total=len(precision.layers))
        for layer in precision.layers:
            errors[layer] = loss(precision.measurable([other for other in precision.layers if other != layer]))
            bar.advance(bar.task_ids[0])
    return errors


def layer_errors(
    precision: Precision, lowered: onnx.ModelProto, samples: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """The worst error among samples of each layer's last value, as `Lowered.errors`."""
    nodes = {node.name: node for node in precision.model.graph.node}
    last = {layer: nodes[names[-1]].output[0] for layer, names in precision.layers.items()}
    there = {name for node in lowered.graph.node for name in node.output}
    real = _real(precision.model)
    last = {layer: name for layer, name in last.items() if name in there and name in real}
    errors = dict.fromkeys(last, 0.0)
    for start in range(0, len(last), _AT_ONCE):
        part = dict(list(last.items())[start : start + _AT_ONCE])
        for sample in samples:
            mine, theirs = (values(model, list(part.values()), sample) for model in (precision.model, lowered))
            for layer, name in part.items():
                errors[layer] = max(errors[layer], _error(mine[name], theirs[name]))
    return errors


def frontier(model: onnx.ModelProto) -> list[str]:
    """Real values that layers pass to the rest of the graph, which stays in float32, or to its outputs."""
    inside = {name for names in layers(model).values() for name in names}
    taken = {name for node in all_nodes(model.graph) if node.name not in inside for name in node.input}
    taken |= {value.name for value in model.graph.output}
    real = _real(model)
    return [
        name
        for node in model.graph.node
        if node.name in inside
        for name in node.output
        if name in taken and name in real
    ]


def _real(model: onnx.ModelProto) -> set[str]:
    return {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }


def values(model: onnx.ModelProto, names: Sequence[str], sample: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """The values with these names inside a graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    given = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Each of many graphs runs only a few times, so opening them is the main cost.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), sample, strict=True)}
    return dict(zip(names, session.run(list(names), feeds)))


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    """rms of the difference / rms of `mine`; infinite for another shape or a NaN."""
    if mine.shape != theirs.shape:
        return float("inf")
    if not mine.size:
        return 0.0
    difference = np.sqrt(np.mean(np.square(theirs.astype(np.float64) - mine)))
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / (np.sqrt(np.mean(np.square(mine.astype(np.float64)))) or 1.0))

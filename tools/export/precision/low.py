"""ONNX graphs in half precision or INT8, layer by layer: the graph itself says what is in lower precision.

Only the operations of a model's submodules are lowered. The operations of the whole model around them (normalisation of
pixels, decoding of boxes, non-maximum suppression, labels) stay in float32.
"""

import ast
import contextlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.calibrate import TensorsData
from torch import Tensor

from terrazzo.errors import InputError
from terrazzo.tools.export.precision.half import in_half_precision, lowerable, rounded

# Where PyTorch's exporter stores the module calls, from the outermost in, that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Operators that ONNX Runtime and TensorRT have in INT8 and that gain by it: products with weights.
_QUANTISED = ("Conv", "MatMul", "Gemm")
# Half precision cannot tell neighbouring pixels apart in an image of a thousand and more.
_COORDINATES = ("RoiAlign", "NonMaxSuppression")


class Precision(Protocol):
    """A lower precision of one graph.

    Attributes:
        name: the name that users give.
        model: the graph in float32.
        layers: the names of the nodes that it can lower, by their layer, in the graph's order.
        limit: the largest error of outputs that passes if no data set decides.
    """

    name: str
    model: onnx.ModelProto
    layers: Mapping[str, tuple[str, ...]]
    limit: float

    def lower(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with all layers except `kept` in lower precision; its inputs and outputs stay in float32."""

    def measurable(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """A graph that ONNX Runtime computes on a CPU as an accelerator computes `lower`."""


class Half:
    """IEEE half precision: weights and values of 16 bits.

    Args:
        model: the graph in float32.
    """

    name = "fp16"
    limit = 1e-2

    def __init__(self, model: onnx.ModelProto):
        able = {node.name for node in lowerable(model)}
        found = {layer: tuple(name for name in names if name in able) for layer, names in layers(model).items()}
        self.model = model
        self.layers = {layer: names for layer, names in found.items() if names}

    def lower(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        return in_half_precision(self.model, self._names(kept))

    def measurable(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        return rounded(self.model, self._names(kept))

    def _names(self, kept: Collection[str]) -> list[str]:
        return [name for layer, names in self.layers.items() if layer not in kept for name in names]


class Int8:
    """Symmetric INT8 of weights (per channel) and of their inputs, as QuantizeLinear and its inverse.

    Args:
        model: the graph in float32.
        samples: the graph's inputs for a number of real images, one tuple per image: the smallest and the largest
            values that they cause inside the graph are the ranges.

    Raises:
        InputError: there is no sample, or no product with weights.
    """

    name = "int8"
    limit = 1e-1

    def __init__(self, model: onnx.ModelProto, samples: Sequence[tuple[Tensor, ...]]):
        if not samples:
            raise InputError("INT8 needs images to set its ranges by, and there are no images")
        weights = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        products = {node.name for node in model.graph.node if _is_product_with_weights(node, weights)}
        found = {layer: tuple(name for name in names if name in products) for layer, names in layers(model).items()}
        self.model = model
        self.layers = {layer: names for layer, names in found.items() if names}
        if not self.layers:
            raise InputError("the model has no product with weights, so there is nothing to put into INT8")
        self.ranges = _ranges(model, samples)

    def lower(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        nodes = [name for layer, names in self.layers.items() if layer not in kept for name in names]
        copy = _copy(self.model)
        if not nodes:
            return copy
        with _quiet():
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=nodes,
                nodes_to_exclude=[],
                op_types_to_quantize=list(_QUANTISED),
                extra_options={
                    # TensorRT takes no zero points, and no quantised bias.
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    # Rounding the outputs of a product as well would gain nothing.
                    "OpTypesToExcludeOutputQuantization": list(_QUANTISED),
                },
            )
            quantizer.quantize_model()
        return quantizer.model.model

    def measurable(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        return self.lower(kept)


def _is_product_with_weights(node: onnx.NodeProto, dims: Mapping[str, int]) -> bool:
    """Whether INT8 is possible: ONNX Runtime refuses a scale per channel for batched weight matrices.

    Args:
        dims: the number of dimensions of each constant, by name.
    """
    found = [dims[name] for name in node.input[:2] if name in dims]
    return node.op_type in _QUANTISED and bool(found) and (node.op_type == "Conv" or max(found) <= 2)


def layers(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The nodes of each layer of an exported graph, in the graph's order.

    A layer is a submodule with its own operations, without the operations of its submodules. Operations of the whole
    model are left out, and so are the own operations of the modules around a RoIAlign: they compute coordinates.
    """
    found, outside = defaultdict(list), set()
    for node in model.graph.node:
        layer = layer_of(node)
        found[layer].append(node.name)
        if node.op_type in _COORDINATES and layer:
            parts = layer.split(".")
            outside |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return {layer: tuple(names) for layer, names in found.items() if layer and layer not in outside}


def layer_of(node: onnx.NodeProto) -> str | None:
    """The path of the submodule that a node comes from; empty for the whole model, None if the exporter did not say."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return None


def _ranges(model: onnx.ModelProto, samples: Sequence[tuple[Tensor, ...]]) -> TensorsData:
    names = [value.name for value in model.graph.input]
    with tempfile.TemporaryDirectory(prefix="terrazzo-int8-") as folder, _quiet():
        file = Path(folder) / "float32.onnx"
        onnx.save(model, file)
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(file, list(_QUANTISED), augmented, CalibrationMethod.MinMax)
        reader = _Reader({name: x.numpy() for name, x in zip(names, sample, strict=True)} for sample in samples)
        calibrator.collect_data(reader)
        return calibrator.compute_data()


class _Reader(CalibrationDataReader):
    def __init__(self, feeds: Iterable[dict[str, np.ndarray]]):
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, because converters change their input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice, which is about its own preprocessing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

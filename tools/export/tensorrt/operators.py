"""Whether TensorRT documents support for every node of an ONNX graph: an answer that needs neither TensorRT nor a GPU.

The table `operators.csv` and the rules below hold what `docs/operators.md` of github.com/onnx/onnx-tensorrt says for
the version named here; for bytes they follow TensorRT's own `DataType`. A graph that passes has only documented
operators, types and attributes; only a GPU shows whether an engine builds, and how fast it is.
"""

import contextlib
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
import onnx
from onnx import helper, numpy_helper

VERSION = "10.15"
OPSETS = (9, 24)
_TOPK_LIMIT = 3840
_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
    "INT64": "INT64",
    "INT32": "INT32",
    "INT8": "INT8",
    "INT4": "INT4",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}
# The input that the table's type means, if it is not the first; None if types do not matter.
_TYPED_INPUT = {"Where": 1, "OneHot": 2, "ConstantOfShape": None, "Constant": None}
# Inputs that must be known when the engine is built.
_CONSTANT_INPUTS = {"CumSum": {1: "axis"}, "OneHot": {1: "depth"}, "Squeeze": {1: "axes"}, "Unsqueeze": {1: "axes"}}


@dataclass(frozen=True)
class Problem:
    """A node for which TensorRT documents no support.

    Attributes:
        node: its name.
        operator: its type.
        reason: what is not supported.
    """

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} ({self.node}): {self.reason}"


@lru_cache(maxsize=1)
def operators() -> dict[str, frozenset[str]]:
    """Every operator that the document lists, with the types it takes; no types if it is not supported."""
    text = resources.files(__package__).joinpath("operators.csv").read_text()
    return {row["operator"]: frozenset(row["types"].split()) for row in csv.DictReader(text.splitlines())}


def problems(model: onnx.ModelProto) -> list[Problem]:
    """The nodes of a model, its subgraphs and functions that TensorRT does not document."""
    found = []
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and not OPSETS[0] <= opset.version <= OPSETS[1]:
            found.append(Problem("model", "opset", f"version {opset.version} is not in {OPSETS[0]} to {OPSETS[1]}"))
    # Shape inference refuses operators of other domains and models over 2 GB: then types that the file lacks are not
    # checked.
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    local = {(function.domain, function.name) for function in model.functions}
    scopes = [_Scope(model.graph, None), *(_Scope(function, None) for function in model.functions)]
    while scopes:
        scope = scopes.pop()
        for node in scope.nodes:
            if (node.domain, node.op_type) not in local:
                found += [Problem(node.name, node.op_type, reason) for reason in _reasons(node, scope)]
            scopes += [_Scope(a.g, scope) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


class _Scope:
    """The nodes of a graph or function, and what is known about its values: types, ranks and constants."""

    def __init__(self, graph: onnx.GraphProto | onnx.FunctionProto, outer: "_Scope | None"):
        self.nodes, self.outer = graph.node, outer
        self.types: dict[str, onnx.TypeProto.Tensor] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.used = {name for node in graph.node for name in node.input}
        if isinstance(graph, onnx.GraphProto):
            for value in (*graph.value_info, *graph.input, *graph.output):
                self.types[value.name] = value.type.tensor_type
            self.constants = {tensor.name: tensor for tensor in graph.initializer}
            self.used |= {value.name for value in graph.output}
        for node in graph.node:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t
                    elif attribute.name.startswith("value_"):
                        array = np.asarray(helper.get_attribute_value(attribute))
                        if array.dtype.kind in "if":
                            self.constants[node.output[0]] = numpy_helper.from_array(array)

    def constant(self, name: str) -> np.ndarray | None:
        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        return self.outer.constant(name) if self.outer else None

    def type_of(self, name: str) -> str | None:
        """The type as the table writes it, or ONNX's name if the table has none; None if it is not known."""
        if name in self.constants:
            code = self.constants[name].data_type
        elif name in self.types:
            code = self.types[name].elem_type
        else:
            return self.outer.type_of(name) if self.outer else None
        onnx_name = onnx.TensorProto.DataType.Name(code)
        return None if onnx_name == "UNDEFINED" else _TYPES.get(onnx_name, onnx_name)

    def rank(self, name: str) -> int | None:
        if name in self.constants:
            return len(self.constants[name].dims)
        if name in self.types and self.types[name].HasField("shape"):
            return len(self.types[name].shape.dim)
        return self.outer.rank(name) if self.outer else None


def _reasons(node: onnx.NodeProto, scope: _Scope) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"the domain {node.domain} is not standard ONNX"
        return
    types = operators().get(node.op_type)
    if types is None:
        yield "the operator is not in the table"
        return
    if not types:
        yield "the operator is not supported"
        return
    place = _TYPED_INPUT.get(node.op_type, 0)
    if place is not None and place < len(node.input):
        kind = scope.type_of(node.input[place])
        if kind is not None and kind not in types:
            yield f"{kind} is not supported, only {', '.join(sorted(types))}"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    constant = dict(_CONSTANT_INPUTS.get(node.op_type, {}))
    if node.op_type.startswith("Reduce"):
        constant[1] = "axes"
    for index, name in constant.items():
        if index < len(node.input) and node.input[index] and scope.constant(node.input[index]) is None:
            yield f"{name} is computed in the graph and must be a constant"
    rule = _RULES.get(node.op_type)
    if rule is not None:
        yield from rule(node, attributes, scope)


def _cast(node, attributes, scope) -> Iterator[str]:
    """A byte is converted only to and from floats."""
    real = ("FP16", "FP32")
    kinds = [scope.type_of(node.input[0]), _TYPES.get(onnx.TensorProto.DataType.Name(attributes["to"]))]
    if "UINT8" in kinds and any(kind not in (None, "UINT8", *real) for kind in kinds):
        yield f"from {kinds[0]} to {kinds[1]} is not supported; UINT8 is converted from and to {', '.join(real)} only"


def _pool(node, attributes, scope) -> Iterator[str]:
    if len(attributes.get("kernel_shape", (1, 1))) not in (2, 3):
        yield "pooling is supported in 2 and 3 dimensions only"
    if math.prod(attributes.get("dilations", (1,))) != 1:
        yield f"dilations {tuple(attributes['dilations'])} are not supported"
    if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
        yield "the output of indices is not supported"


def _resize(node, attributes, scope) -> Iterator[str]:
    known = {
        "mode": ("nearest", ("nearest", "linear")),
        "coordinate_transformation_mode": (
            "half_pixel",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
        "nearest_mode": ("round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
        "keep_aspect_ratio_policy": ("stretch", ("stretch",)),
        "antialias": (0, (0,)),
    }
    for name, (default, allowed) in known.items():
        value = attributes.get(name, default)
        if value not in allowed:
            yield f"{name} {value} is not supported, only {', '.join(map(str, allowed))}"


def _topk(node, attributes, scope) -> Iterator[str]:
    if not attributes.get("sorted", 1):
        yield "it must be sorted"
    count = scope.constant(node.input[1])
    if count is not None and count.size and int(count.max()) >= _TOPK_LIMIT:
        yield f"K is {int(count.max())} and must be less than {_TOPK_LIMIT}"


def _first_output(node, attributes, scope) -> Iterator[str]:
    if any(name and name in scope.used for name in node.output[1:]):
        yield "only its first output is supported"


def _four_axes(node, attributes, scope) -> Iterator[str]:
    rank = scope.rank(node.input[0])
    if rank not in (None, 4):
        yield f"its input has {rank} axes and must have 4"


def _no_reduction(node, attributes, scope) -> Iterator[str]:
    if attributes.get("reduction", "none") != "none":
        yield f"the reduction {attributes['reduction']} is not supported"


def _zero_point(node, attributes, scope) -> Iterator[str]:
    if len(node.input) > 2 and node.input[2]:
        point = scope.constant(node.input[2])
        if point is None or np.any(point.astype(np.float64)):
            yield "the zero point must be 0: quantise symmetrically"


_RULES: dict[str, Callable[..., Iterator[str]]] = {
    "Cast": _cast,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Resize": _resize,
    "TopK": _topk,
    "LayerNormalization": _first_output,
    "GridSample": _four_axes,
    "ScatterND": _no_reduction,
    "QuantizeLinear": _zero_point,
    "DequantizeLinear": _zero_point,
}

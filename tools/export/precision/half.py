"""Puts chosen nodes of an ONNX graph into half precision, and leaves the others untouched.

ONNX Runtime's common converter also rounds values between two nodes that stay in float32: it rounds a detector's boxes
to half pixels and more. Here a value has the type of the node that computes it, and is cast once if nodes of the other
type take it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

_LARGEST = float(np.finfo(np.float16).max)
# Operators that only move values; rounded values stay rounded.
_MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice")
    + ("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where")
)


def lowerable(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes with an operator that, by its schema, takes and gives half precision wherever it now has float32."""
    version = _version(model)
    local = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            continue
        if (node.domain, node.op_type) in local or not defs.has(node.op_type, version, node.domain):
            continue
        schema = defs.get_schema(node.op_type, version, node.domain)
        used = {formal.type_str for _, formal in _formals(node.input, schema.inputs)}
        used |= {formal.type_str for _, formal in _formals(node.output, schema.outputs)}
        generic = [kinds for name, kinds in _kinds(schema).items() if name in used]
        if generic and all("tensor(float16)" in kinds for kinds in generic):
            yield node


def in_half_precision(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of a model in which the nodes of these names compute in half precision; inputs and outputs stay.

    Args:
        model: with the types of all values, as PyTorch's exporter writes them.
        names: of nodes that are `lowerable`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _Converter(copy, set(names)).convert()
    return copy


def rounded(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy that computes in float32 what `in_half_precision` computes, by rounding these nodes' inputs and outputs.

    It shows on a CPU what half precision costs. On a CPU, ONNX Runtime has few half-precision kernels: it computes in
    float32 and omits the rounding between two nodes. It keeps casts in a float32 graph (from 1.17 on).

    Args:
        model: with the types of all values, as PyTorch's exporter writes them.
        names: of nodes that are `lowerable`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, lowered = copy.graph, set(names)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    real = _real(graph)
    clean: set[str] = set()  # values that are rounded already
    nodes, added = [], {}
    for node in graph.node:
        if node.name not in lowered:
            nodes.append(node)
            continue
        for index, name in _generic_inputs(node, _version(copy)):
            if name not in real or name in clean:
                continue
            node.input[index] = f"{name}_rounded"
            if name in constants:
                exact = _rounded(constants[name], node.input[index])
                values = numpy_helper.to_array(exact).astype(np.float32)
                added[node.input[index]] = numpy_helper.from_array(values, node.input[index])
            elif node.input[index] not in clean:
                nodes += _rounding(name, node.input[index])
                clean.add(node.input[index])
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in real:
                if node.op_type not in _MOVES:
                    node.output[index] = f"{name}_exact"
                    nodes += _rounding(node.output[index], name)
                clean.add(name)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.values())
    return copy


class _Converter:
    def __init__(self, model: onnx.ModelProto, names: set[str]):
        self.graph, self.names = model.graph, names
        self.version = _version(model)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.real = _real(self.graph)
        self.outputs = {value.name for value in self.graph.output}
        self.half: set[str] = set()  # outputs of lowered nodes
        self.casts: dict[str, onnx.NodeProto] = {}  # by the name of their output
        self.added: dict[str, TensorProto] = {}

    def convert(self) -> None:
        nodes = []
        for node in self.graph.node:
            lowered = node.name in self.names
            before = len(self.casts)
            if lowered:
                self._lower(node)
            else:
                _replace_inputs(node, self._float32)
            nodes += [*list(self.casts.values())[before:], node]
            if lowered:
                for index, name in enumerate(node.output):
                    if name in self.half and name in self.outputs:
                        node.output[index] = _half(name)
                        nodes.append(_cast(_half(name), name, TensorProto.FLOAT))
                        # nodes in float32 take the cast's output, the others its input
                        self.half.discard(name)
                        self.half.add(_half(name))
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        taken = {name for node in all_nodes(self.graph) for name in node.input} | self.outputs
        kept = [tensor for name, tensor in {**self.constants, **self.added}.items() if name in taken]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        for value in self.graph.value_info:
            if value.name in self.half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16

    def _lower(self, node: onnx.NodeProto) -> None:
        generic = dict(_generic_inputs(node, self.version))
        for index, name in enumerate(node.input):
            if index not in generic:
                node.input[index] = self._float32(name)
            elif name in self.real:
                node.input[index] = self._float16(name)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_rounded(attribute.t, attribute.t.name))
        self.half |= {name for name in node.output if name in self.real}

    def _float16(self, name: str) -> str:
        if name in self.half:
            return name
        lower = _half(name)
        if lower in self.half:
            return lower
        if name in self.constants:
            self.added.setdefault(lower, _rounded(self.constants[name], lower))
        else:
            self.casts.setdefault(lower, _cast(name, lower, TensorProto.FLOAT16))
        return lower

    def _float32(self, name: str) -> str:
        if name not in self.half:
            return name
        higher = f"{name}_float32"
        self.casts.setdefault(higher, _cast(name, higher, TensorProto.FLOAT))
        return higher


def _version(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _real(graph: onnx.GraphProto) -> set[str]:
    """The names of all values in float32."""
    found = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            found.add(value.name)
    return found


def _generic_inputs(node: onnx.NodeProto, version: int) -> list[tuple[int, str]]:
    """The inputs of a node that may be in float32 or in half precision."""
    schema = defs.get_schema(node.op_type, version, node.domain)
    kinds = _kinds(schema)
    return [
        (index, node.input[index]) for index, formal in _formals(node.input, schema.inputs) if formal.type_str in kinds
    ]


def _rounding(source: str, target: str) -> list[onnx.NodeProto]:
    between = f"{target}_float16"
    return [_cast(source, between, TensorProto.FLOAT16), _cast(between, target, TensorProto.FLOAT)]


def _kinds(schema: defs.OpSchema) -> dict[str, list[str]]:
    """The types that each type variable of an operator can have, for variables that allow float32."""
    found = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    return {name: kinds for name, kinds in found.items() if "tensor(float)" in kinds}


def _formals(names: Sequence[str], formals: Sequence[defs.OpSchema.FormalParameter]) -> Iterator[tuple[int, Any]]:
    """The operator's description of each input, or output, of a node; a variadic last description is repeated."""
    for index, name in enumerate(names):
        if name:
            yield index, formals[min(index, len(formals) - 1)]


def _half(name: str) -> str:
    return f"{name}_float16"


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)


def _rounded(tensor: TensorProto, name: str) -> TensorProto:
    """The tensor in half precision; finite values stay finite."""
    values = numpy_helper.to_array(tensor)
    clipped = np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), values)
    return numpy_helper.from_array(clipped.astype(np.float16), name)


def _replace_inputs(node: onnx.NodeProto, replacement: Callable[[str], str]) -> None:
    """Rename the inputs of a node, also inside its subgraphs."""
    for index, name in enumerate(node.input):
        node.input[index] = replacement(name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                _replace_inputs(inner, replacement)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of all its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)

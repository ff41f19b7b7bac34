"""Half precision of named nodes: which values are rounded, and which values must not be rounded."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from terrazzo.tools.export.precision.half import in_half_precision, lowerable, rounded

ONE = np.float32(1)


def _model(nodes, outputs=("y",), constants=None, inside=(), opset=20, size=(4,)):
    def values(names):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in names]

    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", values(["x"]), values(outputs), tensors, value_info=values(inside))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _run(model, x):
    """Run a model in ONNX's evaluator, because ONNX Runtime removes half precision on a CPU."""
    onnx.checker.check_model(model, full_check=True)
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(model).run(None, {"x": np.asarray(x, np.float32)})


def _node(operator, inputs, outputs, name, **attributes):
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


X = (1025.3, 7.123456, -3.3333333, 0.1)


def test_only_named_nodes_round():
    """No digit is lost between two float32 nodes, or between the input and a float32 node."""
    nodes = [
        _node("Neg", ["x"], ["a"], "first"),
        _node("Neg", ["a"], ["b"], "second"),
        _node("Add", ["x", "half"], ["c"], "third"),
        _node("Sub", ["b", "c"], ["y"], "fourth"),
    ]
    model = _model(nodes, ("y", "b"), {"half": ONE / 2}, ("a", "c"))
    (y, b) = _run(in_half_precision(model, ["third"]), X)
    x = np.asarray(X, np.float32)
    assert np.array_equal(b, x)
    wanted = x - (x.astype(np.float16) + np.float16(0.5)).astype(np.float32)
    assert np.array_equal(y, wanted)
    assert not np.array_equal(y, x - (x + ONE / 2))


def test_each_value_is_cast_once():
    """A value is cast once for any number of nodes, in both directions; the given model is not changed."""
    nodes = [
        _node("Neg", ["x"], ["a"], "low0"),
        _node("Neg", ["x"], ["b"], "low1"),
        _node("Add", ["a", "b"], ["c"], "high0"),
        _node("Mul", ["a", "c"], ["y"], "high1"),
    ]
    model = _model(nodes, inside=("a", "b", "c"))
    before = model.SerializeToString()
    lowered = in_half_precision(model, ["low0", "low1"])
    casts = [node.output[0] for node in lowered.graph.node if node.op_type == "Cast"]
    assert sorted(casts) == ["a_float32", "b_float32", "x_float16"]
    assert model.SerializeToString() == before
    kinds = {value.name: value.type.tensor_type.elem_type for value in lowered.graph.value_info}
    assert kinds == {"a": TensorProto.FLOAT16, "b": TensorProto.FLOAT16, "c": TensorProto.FLOAT}
    _run(lowered, X)


def test_outputs_stay_in_float32():
    """Outputs are float32, also if other nodes take an output in either precision."""
    nodes = [
        _node("Neg", ["x"], ["y"], "low0"),
        _node("Neg", ["y"], ["z"], "low1"),
        _node("Neg", ["y"], ["w"], "high"),
    ]
    lowered = in_half_precision(_model(nodes, ("y", "z", "w")), ["low0", "low1"])
    y, z, w = _run(lowered, X)
    rounded = np.asarray(X, np.float32).astype(np.float16).astype(np.float32)
    assert y.dtype == z.dtype == w.dtype == np.float32
    assert np.array_equal(y, -rounded)
    assert np.array_equal(z, rounded)
    assert np.array_equal(w, rounded)


def test_constants():
    """A constant for both kinds of nodes exists twice; finite values stay finite, infinite values stay infinite."""
    big = np.asarray([1e9, -1e9, np.inf, -np.inf], np.float32)
    nodes = [_node("Max", ["x", "big"], ["a"], "high"), _node("Max", ["a", "big"], ["y"], "low")]
    model = _model(nodes, ("y",), {"big": big, "spare": ONE}, ("a",))
    lowered = in_half_precision(model, ["low"])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in lowered.graph.initializer}
    assert set(stored) == {"big", "big_float16"}
    assert stored["big_float16"].tolist() == [65504.0, -65504.0, np.inf, -np.inf]


def test_types_in_attributes():
    """A lowered cast to float32 gives half precision, and a lowered constant node holds its value in half precision."""
    nodes = [
        _node("Constant", [], ["k"], "low0", value=numpy_helper.from_array(np.full(4, 0.1, np.float32))),
        _node("Cast", ["flags"], ["f"], "low1", to=TensorProto.FLOAT),
        _node("Mul", ["k", "f"], ["m"], "low2"),
        _node("Add", ["x", "m"], ["y"], "low3"),
    ]
    model = _model(nodes, ("y",), {"flags": np.asarray([True, False, True, True])}, ("k", "f", "m"))
    (y,) = _run(in_half_precision(model, [f"low{i}" for i in range(4)]), X)
    tenth = np.float16(0.1) * np.asarray([1, 0, 1, 1], np.float16)
    assert np.array_equal(y, (np.asarray(X, np.float16) + tenth).astype(np.float32))


def test_inputs_that_must_be_float32():
    """The scales of Resize are always float32, for every type of the picture."""
    nodes = [_node("Resize", ["x", "", "scales"], ["y"], "low", mode="nearest")]
    scales = np.asarray([1, 1, 2, 2], np.float32)
    model = _model(nodes, ("y",), {"scales": scales}, size=(None,) * 4)
    lowered = in_half_precision(model, ["low"])
    assert [tensor.data_type for tensor in lowered.graph.initializer] == [TensorProto.FLOAT]
    (y,) = _run(lowered, np.ones((1, 1, 2, 2)))
    assert y.shape == (1, 1, 4, 4)


def test_values_that_a_subgraph_takes():
    """A branch stays in float32, and so do the outside values that it takes."""
    branch = helper.make_graph(
        [_node("Neg", ["a"], ["r"], "inner")], "then", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, (4,))]
    )
    other = helper.make_graph(
        [_node("Identity", ["a"], ["s"], "other")],
        "else",
        [],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, (4,))],
    )
    nodes = [
        _node("Neg", ["x"], ["a"], "low"),
        _node("If", ["yes"], ["y"], "choice", then_branch=branch, else_branch=other),
    ]
    model = _model(nodes, ("y",), {"yes": np.asarray(True)}, ("a",))
    assert [node.name for node in lowerable(model)] == ["low"]
    (y,) = _run(in_half_precision(model, ["low"]), X)
    assert np.array_equal(y, np.asarray(X, np.float16).astype(np.float32))


def test_rounded():
    """The float32 graph with the same roundings gives equal results in ONNX Runtime, also with overflow."""
    nodes = [
        _node("Mul", ["x", "k"], ["a"], "low0"),
        _node("Reshape", ["a", "shape"], ["b"], "low1"),
        _node("Add", ["b", "k"], ["c"], "low2"),
        _node("Add", ["c", "x"], ["y"], "high0"),
        _node("Mul", ["k", "y"], ["z"], "high1"),
        _node("Exp", ["x"], ["w"], "low3"),
    ]
    constants = {"k": np.float32(0.1), "shape": np.asarray([4])}
    model = _model(nodes, ("y", "z", "w"), constants, ("a", "b", "c"))
    names = [f"low{i}" for i in range(4)]
    before = model.SerializeToString()
    stand_in = rounded(model, names)
    assert model.SerializeToString() == before
    onnx.checker.check_model(stand_in, full_check=True)
    session = onnxruntime.InferenceSession(stand_in.SerializeToString(), providers=["CPUExecutionProvider"])
    x = (12.345678, -3.3333333, 0.1, 0.7)
    found = session.run(None, {"x": np.asarray(x, np.float32)})
    for mine, theirs in zip(found, _run(in_half_precision(model, names), x)):
        assert np.array_equal(mine, theirs)
    assert np.isinf(found[2]).tolist() == [True, False, False, False]
    assert not np.array_equal(found[0], _run(model, x)[0])


@pytest.mark.parametrize(
    ("operator", "inputs", "able"),
    [
        ("Conv", ("x", "w"), True),
        ("LayerNormalization", ("x", "w"), True),  # its further outputs, which must be float32, are not used
        ("Softmax", ("x",), True),
        ("NonMaxSuppression", ("x", "w"), False),
        ("Shape", ("x",), True),
        ("Unknown", ("x",), False),
    ],
)
def test_lowerable(operator, inputs, able):
    graph = helper.make_graph([_node(operator, inputs, ["y"], "node")], "graph", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    assert bool(list(lowerable(model))) is able

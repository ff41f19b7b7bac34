"""TensorRT's documented operators: the table and further rules. tests/support/capabilities.py checks backbones."""

import onnx
import pytest
from onnx import TensorProto, helper

from terrazzo.tools.export.tensorrt import operators as trt


def _model(nodes, inputs, outputs, initializers=(), opset=20):
    def values(items):
        return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in items]

    graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


IMAGE = (("x", TensorProto.FLOAT, [1, 3, 8, 8]),)
SCALE = helper.make_tensor("s", TensorProto.FLOAT, [8], [1.0] * 8)


def _reasons(operator, inputs=IMAGE, constants=(), outputs=1, opset=20, **attributes):
    names = [name for name, *_ in inputs] + [tensor.name for tensor in constants]
    node = helper.make_node(operator, names, [f"y{i}" for i in range(outputs)], name="node", **attributes)
    results = [(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    return [p.reason for p in trt.problems(_model([node], inputs, results, constants, opset))]


def _tensor(name, values, kind=TensorProto.INT64):
    return helper.make_tensor(name, kind, [len(values)], values)


def test_table():
    table = trt.operators()
    assert len(table) == 200
    assert table["MatMul"] == {"FP32", "FP16", "BF16"}
    assert "INT64" in table["Gather"]
    assert not table["Unique"]


def test_every_listed_operator_is_onnx():
    """All names except a few of old versions are in today's ONNX, so typing errors are found."""
    schemas = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(trt.operators()) - schemas <= {"ParametricSoftplus", "ScaledTanh", "ImageScaler"}


@pytest.mark.parametrize(
    ("operator", "options", "reason"),
    [
        ("Relu", {}, None),
        ("Relu", {"inputs": (("x", TensorProto.DOUBLE, [2]),)}, "DOUBLE is not supported"),
        ("Relu", {"opset": 8}, "version 8 is not in 9 to 24"),
        ("Unique", {}, "the operator is not supported"),
        ("MaxPool", {"kernel_shape": [2, 2]}, None),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, "dilations (2, 2)"),
        ("MaxPool", {"kernel_shape": [2, 2], "outputs": 2}, "indices"),
        ("LayerNormalization", {"constants": [SCALE]}, None),
        (
            "LayerNormalization",
            {"constants": [SCALE], "outputs": 2},
            "first output",
        ),
        ("TopK", {"constants": [_tensor("k", [3])], "outputs": 2}, None),
        ("TopK", {"constants": [_tensor("k", [3])], "outputs": 2, "sorted": 0}, "sorted"),
        ("TopK", {"constants": [_tensor("k", [4000])], "outputs": 2}, "less than 3840"),
        ("ReduceSum", {"constants": [_tensor("a", [1])]}, None),
        (
            "ReduceSum",
            {"inputs": (("x", TensorProto.FLOAT, [1, 3]), ("a", TensorProto.INT64, [1]))},
            "axes is computed in the graph",
        ),
        (
            "GridSample",
            {"inputs": (("x", TensorProto.FLOAT, [1, 2, 3, 4, 5]), ("g", TensorProto.FLOAT, None))},
            "5 axes",
        ),
    ],
)
def test_rules(operator, options, reason):
    found = _reasons(operator, **options)
    assert not found if reason is None else len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(("mode", "fine"), [("linear", True), ("cubic", False)])
def test_resize(mode, fine):
    nodes = [helper.make_node("Resize", ["x", "", "s"], ["y"], name="resize", mode=mode)]
    scales = _tensor("s", [1.0, 1.0, 2.0, 2.0], TensorProto.FLOAT)
    model = _model(nodes, [("x", TensorProto.FLOAT, [1, 3, 8, 8])], [("y", TensorProto.FLOAT, None)], [scales])
    assert (not trt.problems(model)) == fine


@pytest.mark.parametrize(("kind", "fine"), [(TensorProto.FLOAT, True), (TensorProto.BOOL, False)])
def test_bytes_are_made_of_real_numbers(kind, fine):
    node = helper.make_node("Cast", ["x"], ["y"], name="cast", to=TensorProto.UINT8)
    problems = trt.problems(_model([node], [("x", kind, [2])], [("y", TensorProto.UINT8, [2])]))
    assert (not problems) == fine
    assert fine or "from BOOL to UINT8" in problems[0].reason


def test_subgraphs_and_other_domains():
    result = helper.make_tensor_value_info("u", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Unique", ["x"], ["u"], name="inner")], "body", [], [result])
    condition = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)
    other = helper.make_node("Fancy", ["x"], ["z"], name="fancy", domain="com.example")
    inputs = [("c", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, [3])]
    model = _model([condition, other], inputs, [("y", TensorProto.FLOAT, None), ("z", TensorProto.FLOAT, None)])
    assert sorted(p.node for p in trt.problems(model)) == ["fancy", "inner", "inner"]


def test_quantisation_must_be_symmetric():
    def model(point):
        scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
        zero = helper.make_tensor("zero", TensorProto.INT8, [], [point])
        node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="quantize")
        return _model([node], [("x", TensorProto.FLOAT, [3])], [("y", TensorProto.INT8, None)], [scale, zero])

    assert not trt.problems(model(0))
    assert "symmetrically" in trt.problems(model(3))[0].reason

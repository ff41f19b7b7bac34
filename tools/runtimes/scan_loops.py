"""ONNX's Scan nodes as Loop nodes, for runtimes that know only those (OpenVINO)."""

import onnx
from onnx import helper

from terrazzo.errors import InputError

_FIRST_AXIS = ("scan_input_axes", "scan_output_axes")


def loops_for_scans(model: onnx.ModelProto) -> int:
    """Replace every Scan of a model's graph, in place, by a Loop that computes the same.

    Returns:
        How many were replaced.

    Raises:
        InputError: a Scan runs over another axis than the first, or writes its output from the end.
    """
    nodes = list(model.graph.node)
    found = [_loop(node) if node.op_type == "Scan" else [node] for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(node for group in found for node in group)
    return sum(node.op_type == "Scan" for node in nodes)


def _loop(scan: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The Loop and what it needs: one step gathers its slice of every scanned input."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in scan.attribute}
    if any(any(values.get(name, ())) for name in (*_FIRST_AXIS, "scan_output_directions")):
        raise InputError(
            f"the Scan {scan.name!r} does not run forward over the first axis, and only these Scans can become Loops"
        )
    body, name = values["body"], scan.output[0]
    count = len(scan.input) - values["num_scan_inputs"]  # of states
    scanned = scan.input[count:]
    directions = values.get("scan_input_directions") or [0] * len(scanned)

    def constant(value: int, shape: tuple[int, ...], what: str) -> onnx.NodeProto:
        return helper.make_node(
            "Constant",
            [],
            [f"{name}_{what}"],
            value=helper.make_tensor(f"{name}_{what}", onnx.TensorProto.INT64, shape, [value]),
        )

    before = [
        helper.make_node("Shape", [scanned[0]], [f"{name}_length"], start=0, end=1),
        constant(0, (1,), "axis"),
        helper.make_node("Squeeze", [f"{name}_length", f"{name}_axis"], [f"{name}_steps"]),
    ]
    step, going_on = f"{name}_step", f"{name}_going_on"
    inside = []
    for source, direction, target in zip(scanned, directions, body.input[count:]):
        index = step
        if direction:
            index = f"{target.name}_index"
            last = constant(-1, (), f"{target.name}_last")
            # The last step minus this step, counted from the end: -1 - step.
            inside += [last, helper.make_node("Sub", [last.output[0], step], [index])]
        inside.append(helper.make_node("Gather", [source, index], [target.name], axis=0))
    still = f"{going_on}_still"
    inside.append(helper.make_node("Identity", [going_on], [still]))
    graph = helper.make_graph(
        [*inside, *body.node],
        f"{body.name}_loop",
        [
            helper.make_tensor_value_info(step, onnx.TensorProto.INT64, ()),
            helper.make_tensor_value_info(going_on, onnx.TensorProto.BOOL, ()),
            *body.input[:count],
        ],
        [helper.make_tensor_value_info(still, onnx.TensorProto.BOOL, ()), *body.output],
        initializer=list(body.initializer),
        value_info=list(body.value_info),
    )
    return [
        *before,
        helper.make_node(
            "Loop", [f"{name}_steps", "", *scan.input[:count]], list(scan.output), name=scan.name, body=graph
        ),
    ]

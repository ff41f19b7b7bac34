"""Where a failed ONNX file first differs: the first value inside that is not the traced program's."""

import torch
from torch import Tensor, fx

_NODES = 2000


class _Recorder(fx.Interpreter):
    """Runs a traced program and keeps the results of its operations, by their names."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if node.op == "call_function" and isinstance(result, Tensor):
            self.values[node.name] = result
        return result


def first_divergence(program: torch.onnx.ONNXProgram, limit: float) -> str | None:
    """The first operation, in the program's order, with an ONNX value beyond the limit; in a sentence.

    Args:
        program: what `torch.onnx.export` gave; it holds the traced program and the input that it was traced with.
        limit: the largest max |difference| / max |reference|.

    Returns:
        None if the exporter kept no common name of a value.
    """
    exported = program.exported_program
    arguments, _ = exported.example_inputs
    module = exported.module()
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*arguments)
    inside = {value.name for node in program.model.graph for value in node.outputs}
    names = [name for name in recorder.values if name in inside][:_NODES]
    if not names:
        return None
    nodes = {node.name: node for node in module.graph.nodes}
    # One run gives all values: a session per value would take a thousand runs.
    for name, theirs in zip(names, program.compute_values(names, arguments)):
        mine = recorder.values[name]
        error = _relative(mine, torch.as_tensor(theirs))
        if not error <= limit:
            return f"the first value that differs is {name} ({_place(nodes[name])}): relative error {error:.1e}"
    return (
        f"all {len(names)} values inside that ONNX and the traced program share agree within {limit:.0e}: the traced "
        "program itself differs from the results it is compared with"
    )


def _relative(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    scale = mine.abs().max().item() if mine.is_floating_point() else 1.0
    return (mine.double() - theirs.double()).abs().max().item() / (scale or 1.0)


def _place(node: fx.Node) -> str:
    """The submodule that an operation came from, and which operation it is."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].") if stack else ""
    return f"{getattr(node.target, '__name__', node.target)} in {path or 'the model itself'}"

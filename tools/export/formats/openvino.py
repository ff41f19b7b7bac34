"""OpenVINO's own files, made from ONNX graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import openvino
from torch import Tensor

from terrazzo.tools.export.checked import Task
from terrazzo.tools.export.formats.onnx import OnnxForm
from terrazzo.tools.runtimes.openvino import core, open_openvino, readable


class OpenVinoForm:
    """An OpenVINO IR, made from an ONNX graph: NAME.xml and its weights NAME.bin."""

    suffixes = (".xml", ".bin")
    runtime = "OpenVINO"

    def __init__(self, opset: int | None = None):
        self.onnx = OnnxForm(opset)

    def write(self, task: Task, path: Path) -> str:
        graph = path.with_name("graph.onnx")
        self.onnx.write(task, graph)
        model = core().read_model(readable(graph))
        for key, text in task.metadata.items():
            model.set_rt_info(text, ["terrazzo", key])
        # Weights stay in float32: only a user's request lowers the precision, and then its cost is measured.
        openvino.save_model(model, path, compress_to_fp16=False)
        graph.unlink()
        return f"IR of OpenVINO {openvino.__version__.split('-')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return open_openvino(path)[0]

    def divergence(self, task: Task, limit: float) -> str | None:
        return self.onnx.divergence(task, limit)

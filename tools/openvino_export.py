"""OpenVINO's own files, run by OpenVINO on the CPU."""

from collections.abc import Callable, Sequence
from pathlib import Path

import openvino
import torch
from torch import Tensor

from terrazzo.tools.checked_export import Task
from terrazzo.tools.onnx_export import OnnxForm


class OpenVinoForm:
    """An OpenVINO IR, made from an ONNX graph: NAME.xml and its weights NAME.bin."""

    suffixes = (".xml", ".bin")

    def __init__(self, opset: int | None = None):
        self.onnx = OnnxForm(opset)

    def write(self, task: Task, path: Path) -> str:
        graph = path.with_name("graph.onnx")
        self.onnx.write(task, graph)
        model = openvino.convert_model(graph)
        for key, text in task.metadata.items():
            model.set_rt_info(text, ["terrazzo", key])
        # Weights stay in float32: halving them is for the user to ask, with its own figures.
        openvino.save_model(model, path, compress_to_fp16=False)
        graph.unlink()
        return f"IR of OpenVINO {openvino.__version__.split('-')[0]}"

    def load(self, path: Path, task: Task | None = None, precision: str = "f32") -> Callable[..., Sequence[Tensor]]:
        """As a function of tensors.

        Args:
            precision: OpenVINO computes in bfloat16 of itself where a processor can, which costs two digits; "f32" is
                what a comparison with PyTorch needs.
        """
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        names = [next(iter(value.names)) for value in compiled.outputs] if task is None else task.output_names

        def run(*arguments: Tensor) -> list[Tensor]:
            found = compiled([value.numpy() for value in arguments])
            return [torch.from_numpy(found[name].copy()) for name in names]

        return run

    def divergence(self, task: Task, limit: float) -> str | None:
        return self.onnx.divergence(task, limit)

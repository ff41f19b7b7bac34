"""OpenVINO's own files, run by OpenVINO on the CPU."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch
from torch import Tensor

from terrazzo.errors import InputError
from terrazzo.tools.checked_export import Task
from terrazzo.tools.onnx_export import OnnxForm
from terrazzo.tools.scan_loops import loops_for_scans

# Of itself OpenVINO takes bfloat16 where a processor can, which costs two digits.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@cache
def core() -> openvino.Core:
    """The one core of this process.

    A core gives the thread a stack for signals, and puts back the one before when it is destroyed. Of two cores the
    one made first is destroyed first, the other puts back a stack that is gone, and the next signal that Python handles
    (a child's end, Ctrl-C) kills the process.
    """
    return openvino.Core()


def readable(path: Path) -> Path | bytes:
    """A model's file, or what is to be read in its place: OpenVINO knows ONNX's Loop, not its Scan."""
    if path.suffix == ".onnx":
        graph = onnx.load(path)
        if loops_for_scans(graph):
            return graph.SerializeToString()
    return path


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
        # Weights stay in float32: halving them is for the user to ask, with its own figures.
        openvino.save_model(model, path, compress_to_fp16=False)
        graph.unlink()
        return f"IR of OpenVINO {openvino.__version__.split('-')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return self.open(path)[0]

    def open(
        self, path: Path, settings: Mapping[str, Any] = FLOAT32
    ) -> tuple[Callable[..., Sequence[Tensor]], dict[str, str], tuple[int, int] | None]:
        """A file as a function of tensors, what it says about itself, and H, W of its images; None if they are open.

        Args:
            path: an IR, or an ONNX file, which OpenVINO reads, too.
            settings: OpenVINO's own for the CPU.

        Raises:
            InputError: OpenVINO cannot load it.
        """
        try:
            model = core().read_model(readable(path))
            compiled = core().compile_model(model, "CPU", dict(settings))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1]
            raise InputError(f"OpenVINO cannot load {path.name}: {reason}") from error

        def run(*arguments: Tensor) -> list[Tensor]:
            found = compiled([value.numpy() for value in arguments])
            return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

        info = model.get_rt_info()
        facts = {key: value.astype(str) for key, value in info["terrazzo"].items()} if "terrazzo" in info else {}
        sides = model.inputs[0].partial_shape[2:]
        size = tuple(side.get_length() for side in sides) if sides.is_static else None
        return run, facts, size

    def divergence(self, task: Task, limit: float) -> str | None:
        return self.onnx.divergence(task, limit)

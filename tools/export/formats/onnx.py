"""ONNX files, run by ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.tools.export.checked import Report, Task, checked_export, not_exportable, opened
from terrazzo.tools.export.divergence import first_divergence
from terrazzo.tools.runtimes.onnx import open_onnx

OLDEST_OPSET = 18


class OnnxForm:
    """One ONNX file of standard operators, by PyTorch's dynamo exporter.

    Args:
        opset: version of the operator set; None for PyTorch's choice.

    Raises:
        InputError: the version does not exist, or PyTorch does not write it.
    """

    suffixes = (".onnx",)
    runtime = "ONNX Runtime"

    def __init__(self, opset: int | None = None):
        newest = onnx.defs.onnx_opset_version()
        if opset is not None and not OLDEST_OPSET <= opset <= newest:
            raise InputError(
                f"the opset is {opset}; PyTorch writes {OLDEST_OPSET} to {newest}: name one of these or leave it out"
            )
        self.opset = opset
        self.program: torch.onnx.ONNXProgram | None = None

    def write(self, task: Task, path: Path) -> str:
        self.program = self._trace(task)
        opset = self.program.model.opset_imports[""]
        if self.opset not in (None, opset):  # if the conversion fails, PyTorch goes on without it
            name = type(task.module).__name__
            raise InputError(f"{name} cannot be exported to opset {self.opset}, only to {opset}; leave the opset out")
        self.program.model.metadata_props.update(task.metadata)
        path.write_bytes(self.program.model_proto.SerializeToString())
        return f"opset {opset}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return open_onnx(path)[0]

    def divergence(self, task: Task, limit: float) -> str | None:
        return first_divergence(self.program, limit)

    def _trace(self, task: Task) -> torch.onnx.ONNXProgram:
        arguments, shapes = opened(task)
        try:
            with torch.no_grad():
                return torch.onnx.export(
                    task.module,
                    arguments,
                    dynamo=True,
                    input_names=list(task.input_names),
                    output_names=list(task.output_names),
                    dynamic_shapes=shapes,
                    opset_version=self.opset,
                    verbose=False,
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            raise not_exportable(task.module, "ONNX", error) from error


def export_onnx(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], path: str | Path, *, opset: int | None = None, **options
) -> Report:
    """`checked_export` to ONNX, compared by ONNX Runtime; it takes the `options`."""
    return checked_export(OnnxForm(opset), module, example, path, **options)

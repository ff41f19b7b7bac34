"""PyTorch's own exported programs, run by PyTorch without the model's code."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from terrazzo.tools.checked_export import Task, as_tuple, not_exportable, opened


class ProgramForm:
    """A `torch.export` program: NAME.pt2, for `torch.export.load`. The input is positional, and so are the outputs."""

    suffixes = (".pt2",)

    def write(self, task: Task, path: Path) -> str:
        arguments, shapes = opened(task)
        try:
            with torch.no_grad():
                program = torch.export.export(task.module, arguments, dynamic_shapes=shapes)
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            raise not_exportable(task.module, "pt2", error) from error
        names = {"inputs": ", ".join(task.input_names), "outputs": ", ".join(task.output_names)}
        torch.export.save(program, path, extra_files={**task.metadata, **names})
        return f"torch.export of PyTorch {torch.__version__.split('+')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        module = torch.export.load(path).module()

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(module(*arguments))

        return run

    def divergence(self, task: Task, limit: float) -> str | None:
        return None

"""PyTorch's own exported programs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from terrazzo.tools.export.checked import Task, not_exportable, opened
from terrazzo.tools.runtimes.program import open_program


class ProgramForm:
    """A `torch.export` program: NAME.pt2, for `torch.export.load`. The input is positional, and so are the outputs."""

    suffixes = (".pt2",)
    runtime = "the exported program"

    def write(self, task: Task, path: Path) -> str:
        names = {"inputs": ", ".join(task.input_names), "outputs": ", ".join(task.output_names)}
        torch.export.save(traced(task, "pt2"), path, extra_files={**task.metadata, **names})
        return f"torch.export of PyTorch {torch.__version__.split('+')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return open_program(path)[0]

    def divergence(self, task: Task, limit: float) -> str | None:
        return None


def traced(task: Task, form: str) -> torch.export.ExportedProgram:
    """The program of a task.

    Args:
        task: what to export.
        form: name of the format, for the message.

    Raises:
        InputError: the module cannot be traced.
    """
    arguments, shapes = opened(task)
    try:
        with torch.no_grad():
            return torch.export.export(task.module, arguments, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        raise not_exportable(task.module, form, error) from error

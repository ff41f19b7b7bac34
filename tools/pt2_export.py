"""PyTorch's own exported programs, run by PyTorch without the model's code."""

import contextlib
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torchvision  # noqa: F401  programs of detectors call its operators
from torch import Tensor

from terrazzo.errors import InputError, first_line
from terrazzo.tools.checked_export import Task, as_tuple, not_exportable, opened


class ProgramForm:
    """A `torch.export` program: NAME.pt2, for `torch.export.load`. The input is positional, and so are the outputs."""

    suffixes = (".pt2",)
    runtime = "the exported program"

    def write(self, task: Task, path: Path) -> str:
        names = {"inputs": ", ".join(task.input_names), "outputs": ", ".join(task.output_names)}
        torch.export.save(traced(task, "pt2"), path, extra_files={**task.metadata, **names})
        return f"torch.export of PyTorch {torch.__version__.split('+')[0]}"

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        return self.open(path)[0]

    def open(self, path: Path) -> tuple[Callable[..., Sequence[Tensor]], dict[str, str], tuple[int, int] | None]:
        """A file as a function of tensors, what it says about itself, and H, W of its images; None if they are open.

        Raises:
            InputError: PyTorch cannot load it as a program.
        """
        if zipfile.is_zipfile(path) and any("aotinductor" in name for name in zipfile.ZipFile(path).namelist()):
            raise InputError(f"{path.name} was exported with --format aoti; run it with --runtime aoti")
        facts = {"task": ""}  # PyTorch fills it with all that there is, but only where it is not empty
        with loading(path, "torch.export"):
            program = torch.export.load(path, extra_files=facts)
        module, image = program.module(), program.graph_signature.user_inputs[0]
        sides = next(node.meta["val"].shape[-2:] for node in program.graph.nodes if node.name == image)
        size = tuple(sides) if all(isinstance(side, int) for side in sides) else None

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(module(*arguments))

        return run, facts, size

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


@contextlib.contextmanager
def loading(path: Path, reader: str) -> Iterator[None]:
    """Turn whatever PyTorch says and raises about a file that it cannot load into an InputError of one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:  # what is no archive, of another kind or of another version fails in many ways
        raise InputError(f"{reader} cannot load {path.name}: {first_line(error)}") from error
    finally:
        logging.disable(before)

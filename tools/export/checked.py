"""Exports a module to a file that is proven to compute the same: write, run, compare with PyTorch, publish."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from terrazzo._files import written_whole
from terrazzo.backbones._modes import evaluating
from terrazzo.errors import InputError, TerrazzoError, first_line
from terrazzo.tools.export.parity import LABEL_LIMIT, RELATIVE_LIMIT, Parity, compare
from terrazzo.tools.files import check_output_file
from terrazzo.tools.runtimes import as_tuple

# Rows and columns that are added to an example to try an open size. They are odd, because a file may take only the
# multiples of a number that its example is a multiple of.
LARGER = (33, 65)
# The same for models that take only multiples of their patches.
LARGER_IN_PATCHES = (32, 64)


@dataclass(frozen=True)
class Task:
    """What a format has to write.

    Attributes:
        module: in evaluation mode; gives a tensor, or a list or tuple of tensors.
        arguments: the tensors to trace with; their first dimension is the batch.
        input_names, output_names: names in the file.
        dynamic: which of "batch" and "hw" (height and width) stay open.
        metadata: texts to store in the file, where the format has a place for them.
    """

    module: nn.Module
    arguments: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: frozenset[str]
    metadata: Mapping[str, str]


class Form(Protocol):
    """A file format.

    Attributes:
        suffixes: the suffixes of its files; users name the file with the first.
        runtime: what runs the file, in words.
    """

    suffixes: tuple[str, ...]
    runtime: str

    def write(self, task: Task, path: Path) -> str:
        """Write the file at `path`, and the files with the other suffixes beside it; return the format's version.

        Raises:
            InputError: the module cannot be traced, or has an operation that the format lacks.
        """

    def load(self, path: Path, task: Task) -> Callable[..., Sequence[Tensor]]:
        """The file as a function of tensors, on the CPU."""

    def divergence(self, task: Task, limit: float) -> str | None:
        """Where inside the module the last written file first differs, in a sentence; None if that is not known."""


@dataclass(frozen=True)
class Report:
    """The result of an export.

    Attributes:
        path: the file that was written; it ends in `.failed` when the check failed.
        volume: bytes of the file and of the files beside it.
        parities: one for each output and input.
        version: the format's version, such as "opset 20".
        divergence: where a file that failed first differs, or None.
    """

    path: Path
    volume: int
    parities: tuple[Parity, ...]
    version: str
    divergence: str | None = None

    @property
    def passed(self) -> bool:
        return all(parity.passed for parity in self.parities)

    @property
    def compared(self) -> bool:
        """Whether every output had something to compare on some input; a detector may find no box at all."""
        return {parity.output for parity in self.parities if parity.compared} == {
            parity.output for parity in self.parities
        }

    @property
    def worst(self) -> float:
        """The largest relative error among the real-valued outputs."""
        return max((parity.figure for parity in self.parities if not parity.exact), default=0.0)


def checked_export(
    form: Form,
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    checks: Mapping[str, Tensor | tuple[Tensor, ...]] | None = None,
    reference: Callable[..., Tensor | Sequence[Tensor]] | None = None,
    input_names: Sequence[str] = ("image",),
    output_names: Sequence[str] | None = None,
    dynamic: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
    relative_limit: float = RELATIVE_LIMIT,
    label_limit: float = LABEL_LIMIT,
) -> Report:
    """Export a module, compare the file's results on the CPU with PyTorch's, and keep it as named only if they agree.

    Args:
        form: the format.
        module: gives a tensor, or a list or tuple of tensors; it is exported in evaluation mode.
        example: the input tensors to trace with; their first dimension is the batch.
        path: the file to write. When the check fails, it is written with the suffix `.failed` added.
        checks: further inputs to compare on, by name; `example` is always one of them.
        reference: gives the results to compare with, from the same inputs; None for the module itself.
        input_names: names of the inputs in the file.
        output_names: names of the outputs in the file; None for output_0, output_1, ...
        dynamic: which of "batch" and "hw" (height and width) to leave open; a batch that is larger by 1 than the
            example's, or images that are `LARGER` pixels higher and wider, are compared, too; `LARGER_IN_PATCHES`
            pixels if the module does not take images of that size.
        metadata: texts to store in the file.
        relative_limit: largest max |difference| / max |reference| of real-valued outputs.
        label_limit: largest share of differing elements of integer outputs.

    Returns:
        The figures, and where the file is.

    Raises:
        InputError: the module does not take the inputs, cannot be traced, or has an operation that the format lacks;
            the file does not take the inputs; or the path cannot be written.
    """
    path = check_output_file(Path(path))
    if len(form.suffixes) > 1 and path.suffix != form.suffixes[0]:
        raise InputError(f"{path} must end in {form.suffixes[0]}: its weights go beside it, as {form.suffixes[1]}")
    arguments = as_tuple(example)
    with evaluating(module):
        inputs = {"example": arguments, **{name: as_tuple(value) for name, value in (checks or {}).items()}}
        if "batch" in dynamic:
            inputs["larger batch"] = tuple(torch.cat([value, value[:1].flip(-1)]) for value in arguments)
        compared = reference or module
        references = {name: _expected(compared, value) for name, value in inputs.items()}
        if "hw" in dynamic:
            inputs["larger image"], references["larger image"] = _larger(compared, arguments)
        count = len(references["example"])
        names = tuple(output_names or (f"output_{index}" for index in range(count)))
        if len(names) != count:
            raise InputError(f"the module has {count} outputs, but {len(names)} names are given: {', '.join(names)}")
        task = Task(module, arguments, tuple(input_names), names, frozenset(dynamic), metadata or {})
        divergence = None
        with tempfile.TemporaryDirectory(prefix="terrazzo-export-") as folder:
            file = Path(folder) / path.with_suffix(form.suffixes[0]).name
            version = form.write(task, file)
            run = form.load(file, task)
            parities = tuple(
                parity
                for source, expected in references.items()
                for parity in compare(
                    names, source, expected, _found(run, source, inputs[source]), relative_limit, label_limit
                )
            )
            if not all(parity.passed for parity in parities):
                divergence = form.divergence(task, relative_limit)
                path = path.with_name(f"{path.name}.failed")
            volume = sum(file.with_suffix(suffix).stat().st_size for suffix in form.suffixes)
            _publish(file, form.suffixes, path)
        return Report(path, volume, parities, version, divergence)


def _larger(
    reference: Callable[..., Tensor | Sequence[Tensor]], inputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Larger images than these, and PyTorch's results."""
    odd, even = (
        tuple(pad(value, (0, more[1], 0, more[0]), "replicate") for value in inputs)
        for more in (LARGER, LARGER_IN_PATCHES)
    )
    try:
        return odd, _expected(reference, odd)
    except InputError:
        return even, _expected(reference, even)


@torch.no_grad()
def _expected(reference: Callable[..., Tensor | Sequence[Tensor]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """PyTorch's results; InputError if the model does not take the inputs."""
    try:
        return as_tuple(reference(*inputs))
    except TerrazzoError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the model cannot take images of {_sizes(inputs)}: {first_line(error)}; name another size"
        ) from error


def _found(run: Callable[..., Sequence[Tensor]], source: str, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """The file's results; InputError if it does not take the module's inputs: older exporters fix sizes unasked."""
    try:
        return run(*inputs)
    except TerrazzoError:
        raise
    except Exception as error:  # each runtime raises what it likes
        raise InputError(f"the exported file fails on the {source} ({_sizes(inputs)}): {first_line(error)}") from error


def _publish(file: Path, suffixes: tuple[str, ...], path: Path) -> None:
    """Copy a file and the files beside it to their places, and the file that users name last."""
    beside = Path(path.name.removesuffix(".failed")).stem
    for suffix in suffixes[:0:-1]:
        target = path.with_name(f"{beside}{suffix}{'.failed' if path.suffix == '.failed' else ''}")
        with written_whole(target) as temporary:
            shutil.copyfile(file.with_suffix(suffix), temporary)
    with written_whole(path) as temporary:
        shutil.copyfile(file, temporary)


def opened(task: Task) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...] | None]:
    """Arguments to trace a task with, and the shapes for `torch.export`; None if all are fixed."""
    arguments, shape = task.arguments, {}
    if "batch" in task.dynamic:
        shape[0] = torch.export.Dim("batch", min=1)
        if arguments[0].shape[0] == 1:  # torch.export takes a size of 1 for a constant, so it must see another size
            arguments = tuple(torch.cat([x, x]) for x in arguments)
    if "hw" in task.dynamic:  # unlike a named size, an automatic size may turn out to be a multiple of something
        shape |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return arguments, tuple(dict(shape) for _ in arguments) if shape else None


def _sizes(inputs: tuple[Tensor, ...]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in inputs)


def not_exportable(module: nn.Module, form: str, error: Exception) -> InputError:
    """One line for an error from PyTorch's exporter."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        if isinstance(cause, TerrazzoError):  # an operator of terrazzo says why
            return InputError(f"{type(module).__name__} cannot be exported to {form}: {cause}")
    cause = error.__cause__ or error
    return InputError(
        f"{type(module).__name__} cannot be exported to {form}: {type(cause).__name__}: {first_line(cause)} "
        "(TERRAZZO_TRACEBACK=1 shows where)"
    )

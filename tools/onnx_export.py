"""A module as an ONNX file that is proven to compute the same: export, run in ONNX Runtime, compare, then publish."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.files import check_output_file
from terrazzo.tools.parity import LABEL_LIMIT, RELATIVE_LIMIT, Parity, compare


@dataclass(frozen=True)
class Report:
    """What an export led to.

    Attributes:
        path: the file that was written; it ends in `.failed` when the check failed.
        parities: one for each output and input.
        opset: version of the ONNX operator set.
    """

    path: Path
    parities: tuple[Parity, ...]
    opset: int

    @property
    def passed(self) -> bool:
        return all(parity.passed for parity in self.parities)

    @property
    def compared(self) -> bool:
        """Whether every output had something to compare on some input; a detector may have found no box at all."""
        return {parity.output for parity in self.parities if parity.compared} == {
            parity.output for parity in self.parities
        }

    @property
    def worst(self) -> float:
        """The largest relative error among the outputs of real numbers."""
        return max((parity.figure for parity in self.parities if not parity.exact), default=0.0)


def export_onnx(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    checks: Mapping[str, Tensor | tuple[Tensor, ...]] | None = None,
    reference: Callable[..., Tensor | Sequence[Tensor]] | None = None,
    input_names: Sequence[str] = ("image",),
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    relative_limit: float = RELATIVE_LIMIT,
    label_limit: float = LABEL_LIMIT,
) -> Report:
    """Export a module, compare ONNX Runtime on the CPU with PyTorch, and keep the file only if they agree.

    Args:
        module: gives a tensor, or a list or tuple of tensors; it is exported in evaluation mode.
        example: the input tensors to trace with; their first dimension is the batch.
        path: the file to write. When the check fails, it is written with the suffix `.failed` added.
        checks: further inputs to compare on, by name; `example` is always one of them.
        reference: gives the results to compare with, from the same inputs; None for the module itself.
        input_names: names of the inputs in the file.
        output_names: names of the outputs in the file; None for output_0, output_1, ...
        dynamic_batch: leave the batch size open; a batch one larger than the example's is compared too.
        opset: version of the operator set; None for PyTorch's choice.
        metadata: texts to store in the file.
        relative_limit: largest max |difference| / max |reference| of outputs of real numbers.
        label_limit: largest share of differing elements of integer outputs.

    Returns:
        The figures, and where the file is.

    Raises:
        InputError: the module cannot be traced or has an operator without an ONNX form, or the path cannot be written.
    """
    path = check_output_file(Path(path))
    arguments = _tuple(example)
    module = module.eval()
    inputs = {"example": arguments, **{name: _tuple(value) for name, value in (checks or {}).items()}}
    if dynamic_batch:
        inputs["larger batch"] = tuple(torch.cat([value, value[:1].flip(-1)]) for value in arguments)
    with torch.no_grad():
        references = {name: _tuple((reference or module)(*value)) for name, value in inputs.items()}
    count = len(references["example"])
    names = list(output_names or (f"output_{index}" for index in range(count)))
    if len(names) != count:
        raise InputError(f"the module has {count} outputs, but {len(names)} names are given: {', '.join(names)}")
    program = _trace(module, arguments, list(input_names), names, dynamic_batch, opset)
    program.model.metadata_props.update(metadata or {})
    data = program.model_proto.SerializeToString()
    outputs = _run(data, list(input_names), inputs)
    parities = tuple(
        parity
        for source, expected in references.items()
        for parity in compare(names, source, expected, outputs[source], relative_limit, label_limit)
    )
    if not all(parity.passed for parity in parities):
        path = path.with_name(f"{path.name}.failed")
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
    return Report(path, parities, program.model.opset_imports[""])


def _tuple(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _trace(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    input_names: list[str],
    output_names: list[str],
    dynamic_batch: bool,
    opset: int | None,
) -> torch.onnx.ONNXProgram:
    shapes = None
    if dynamic_batch:
        shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in arguments)
        if arguments[0].shape[0] == 1:  # torch.export takes a size of 1 for a constant, so it must see another one
            arguments = tuple(torch.cat([x, x]) for x in arguments)
    try:
        with torch.no_grad():
            return torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0]
        raise InputError(
            f"{type(module).__name__} cannot be exported to ONNX: {type(cause).__name__}: {reason} "
            "(TERRAZZO_TRACEBACK=1 shows where)"
        ) from error


def _run(data: bytes, input_names: list[str], inputs: Mapping[str, tuple[Tensor, ...]]) -> dict[str, list[Tensor]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return {
        name: [
            torch.as_tensor(output)
            for output in session.run(None, {key: value.numpy() for key, value in zip(input_names, values)})
        ]
        for name, values in inputs.items()
    }

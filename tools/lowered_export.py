"""`terrazzo export --fp16` and `--int8`: an ONNX file in lower precision, and what that costs, layer by layer.

Where a config has test data its metric decides, before and after, on the files themselves: errors of outputs say little
(a detector can lose boxes that a classifier's logits do not show).
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.low_precision import Half, Int8, Precision
from terrazzo.tools.results import Row, about, write
from terrazzo.tools.sensitivity import Lowered, lower, output_error

# Images that values inside of the graph are compared on; ranges of INT8 are set by all that there are.
_COMPARED = 4
SUFFIX = ".precision.csv"

Points = Mapping[str, float]


@dataclass(frozen=True)
class LoweredFile:
    """A file in lower precision.

    Attributes:
        path: where it is; it ends in `.failed` where it loses too much.
        table: the CSV beside it: points before and after, and every layer's error.
        lowered: the graph, and which layers stay.
        layers: how many there are.
        before, after: points from 0 to 100 of the metrics that decide, by name; empty without data.
        error: of the outputs, as of 0..1.
    """

    path: Path
    table: Path
    lowered: Lowered
    layers: int
    before: Points
    after: Points
    error: float


def lower_file(
    file: Path,
    name: str,
    out: Path,
    samples: Sequence[tuple[Tensor, ...]],
    points: Callable[[Path], Points] | None,
    tolerance: float,
    variant: str,
) -> LoweredFile:
    """Write a file in lower precision, with as many layers in it as the tolerance allows.

    Args:
        file: an ONNX file in float32 that is known to be right.
        name: "fp16" or "int8".
        out: what to write; `.failed` is added where no choice of layers is good enough.
        samples: the graph's inputs for real images, one tuple an image.
        points: measures a file; None where there is no data, and the error of the outputs decides.
        tolerance: how many points may be lost.
        variant: what the file is, for the table.

    Raises:
        InputError: there is nothing to lower, no image to set ranges by, or nothing found in the test data.
    """
    model = onnx.load(file)
    precision: Precision = Half(model) if name == "fp16" else Int8(model, samples)
    compared = samples[:_COMPARED]
    error_of = output_error(precision, compared)
    before, measured = {}, {}
    with tempfile.TemporaryDirectory(prefix="terrazzo-precision-") as folder:

        def lost(candidate: onnx.ModelProto) -> float:
            path = Path(folder) / "candidate.onnx"
            onnx.save(candidate, path)
            measured.update(dict.fromkeys(before, 0.0) | dict(points(path)))
            return max(before[metric] - measured[metric] for metric in before)

        if points is None:
            lowered = lower(precision, compared, error_of, precision.limit)
        else:
            before = dict(points(file))
            if not before:
                raise InputError(
                    f"{variant} finds nothing in the test data, in float32 either; give it trained weights"
                )
            lowered = lower(precision, compared, lost, tolerance)
    path = out if lowered.passed else out.with_name(f"{out.name}.failed")
    entry = lowered.model.metadata_props.add()
    entry.key, entry.value = "precision", f"{name}, but float32 in: {', '.join(lowered.kept) or 'no layer'}"
    with written_whole(path) as temporary:
        temporary.write_bytes(lowered.model.SerializeToString())
    result = LoweredFile(
        path,
        out.with_name(f"{out.stem}{SUFFIX}"),
        lowered,
        len(precision.layers),
        before,
        dict(measured),
        error_of(lowered.model),
    )
    shape = "x".join(str(side) for side in samples[0][0].shape)
    write(result.table, _rows(result, variant, shape, file.stat().st_size))
    return result


def _rows(result: LoweredFile, variant: str, shape: str, volume: int) -> list[Row]:
    """The table of a file: its metrics, its size, and the error of each layer with what became of it."""
    lowered = result.lowered
    last = about(torch.device("cpu"), "onnx", "onnxruntime")

    def row(dtype: str, metric: str, unit: str, value: float) -> Row:
        return Row("precision", variant, shape, dtype, "onnxruntime", metric, unit, value, value, value, *last)

    rows = [row("float32", metric, "points", value) for metric, value in result.before.items()]
    rows += [row(lowered.precision, metric, "points", value) for metric, value in result.after.items()]
    rows += [
        row("float32", "file size", "MiB", volume / 2**20),
        row(lowered.precision, "file size", "MiB", lowered.model.ByteSize() / 2**20),
        row(lowered.precision, "error of the outputs", "1", result.error),
        row(lowered.precision, "layers", "1", result.layers),
        row(lowered.precision, "layers in float32", "1", len(lowered.kept)),
    ]
    for layer, error in lowered.errors.items():
        dtype = "float32" if layer in lowered.kept else lowered.precision
        rows.append(row(dtype, f"error at {layer}", "1", error))
    rows += [row(lowered.precision, f"error by {layer} alone", "1", error) for layer, error in lowered.alone.items()]
    return rows


def check_request(name: str, form: str, batch: int, dynamic: Sequence[str]) -> None:
    """InputError where a file in lower precision is asked for that cannot be written or measured."""
    if form not in ("onnx", "tensorrt"):
        raise InputError(f"--{name} writes ONNX files, which OpenVINO reads too; use --format onnx instead of {form}")
    if batch > 1 and "batch" not in dynamic:
        raise InputError(f"--{name} is measured one image a run: leave --batch out, or add --dynamic batch")

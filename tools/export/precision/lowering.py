"""`terrazzo export --fp16` and `--int8`: files in lower precision, and what that costs, layer by layer.

If a config has test data, its metric decides, measured on the files before and after. Errors of outputs say little: a
detector can lose boxes that a classifier's logits do not show.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import onnx
import torch
from torch import Tensor

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.console import print_table
from terrazzo.tools.data.pictures import Picture, find_pictures
from terrazzo.tools.export.precision.low import Half, Int8, Precision
from terrazzo.tools.export.precision.restored import ERROR as RESTORED_ERROR
from terrazzo.tools.export.precision.restored import degraded_inputs, held_out, psnr_to
from terrazzo.tools.export.precision.sensitivity import Lowered, lower, output_error
from terrazzo.tools.export.targets import Exportable, floor, noise, photo
from terrazzo.tools.predict.files import FilePredictor, file_predictor
from terrazzo.tools.results import Row, about, write

# The largest number of pictures that set the ranges of INT8, and of pictures that values inside the graph are compared
# on.
_CALIBRATION, _COMPARED = 64, 4
SUFFIX = ".precision.csv"

Points = Mapping[str, float]
Samples = Sequence[tuple[Tensor, ...]]
Metric = Callable[[FilePredictor], Points]


@dataclass(frozen=True)
class LoweredFile:
    """A file in lower precision.

    Attributes:
        path: where it is; it ends in `.failed` if it loses too much.
        table: the CSV beside it: points before and after, and every layer's error.
        lowered: the graph, and which layers stay.
        layers: the number of layers.
        before, after: points from 0 to 100, or dB, of the metrics that decide, by name; empty without data.
        error: the relative error of the outputs, 0..1.
        psnr: a restorer's PSNR in dB against float32's pictures, on pictures that set no ranges.
    """

    path: Path
    table: Path
    lowered: Lowered
    layers: int
    before: Points
    after: Points
    error: float
    psnr: float | None = None


class Evidence(NamedTuple):
    """What decides about a lower precision.

    Attributes:
        samples: inputs for real images.
        metric: the metric of a file; None without a config.
        held_out: further inputs, on which a restorer's pictures are compared.
    """

    samples: Samples
    metric: Metric | None
    held_out: Samples = ()


def evidence(ready: Exportable, name: str, pictures: Path | None) -> Evidence:
    """What decides about a lower precision.

    Args:
        ready: the model.
        name: "fp16" or "int8".
        pictures: a folder; None for the config's training data, or else for drawn pictures.

    Raises:
        InputError: the data is not there, or INT8 has no pictures to set its ranges by, or a restorer has only one.
    """
    restores = ready.task == "restoration"
    metric = None
    if ready.config is not None:
        from terrazzo.tools.data.checks import check_data
        from terrazzo.tools.export.precision.file_metric import FileMetric, training_pictures

        check_data(ready.config, ("test",) if pictures else ("train", "test"))
        metric = FileMetric(ready.config)
    if pictures is not None:
        found = find_pictures([pictures])[:_CALIBRATION]
    elif ready.config is not None:
        found = [Picture(path, path.name) for path in training_pictures(ready.config, _CALIBRATION)]
    elif name == "int8":
        raise InputError("--int8 sets its ranges by pictures: name a folder of pictures with --pictures DIR")
    else:
        drawn = [(floor(ready.size, 1),), (noise(ready.size, 1),)]
        return Evidence(drawn, None, drawn[:1] if restores else ())
    if restores:
        samples, rest = held_out(degraded_inputs(ready, found))
        return Evidence(samples, metric, rest)
    return Evidence([(photo(picture.read(), ready.size, 1),) for picture in found], metric)


def lower_file(
    file: Path,
    name: str,
    out: Path,
    samples: Sequence[tuple[Tensor, ...]],
    points: Callable[[Path], Points] | None,
    tolerance: float,
    variant: str,
    rest: Samples = (),
) -> LoweredFile:
    """Write a file with as many layers in lower precision as the tolerance allows.

    Args:
        file: an ONNX file in float32 that is known to be right.
        name: "fp16" or "int8".
        out: the file to write; `.failed` is added if no choice of layers is good enough.
        samples: the graph's inputs for real images, one tuple per image.
        points: measures a file; None without data, then the error of the outputs decides.
        tolerance: how many points, or dB, may be lost.
        variant: the file's name in the table.
        rest: inputs on which a restorer's pictures are compared; then the errors have another limit,
            `restored.ERROR`.

    Raises:
        InputError: there is nothing to lower or no image to set ranges by, or the model finds nothing in the test data.
    """
    model = onnx.load(file)
    precision: Precision = Half(model) if name == "fp16" else Int8(model, samples)
    compared = samples[:_COMPARED]
    error_of = output_error(precision, compared)
    before, measured = {}, {}
    with tempfile.TemporaryDirectory(prefix="terrazzo-precision-") as folder:

        def cost(candidate: onnx.ModelProto) -> float:
            path = Path(folder) / "candidate.onnx"
            onnx.save(candidate, path)
            measured.update(dict.fromkeys(before, 0.0) | dict(points(path)))
            return lost(before, measured)

        if points is None:
            lowered = lower(precision, compared, error_of, RESTORED_ERROR if rest else precision.limit)
        else:
            before = dict(points(file))
            if not before:
                raise InputError(
                    f"{variant} finds nothing in the test data, not even in float32; give it trained weights"
                )
            lowered = lower(precision, compared, cost, tolerance)
    entry = lowered.model.metadata_props.add()
    entry.key, entry.value = "precision", f"{name}, but float32 in: {', '.join(lowered.kept) or 'no layer'}"
    path = out if lowered.passed else out.with_name(f"{out.name}.failed")
    with written_whole(path) as temporary:
        temporary.write_bytes(lowered.model.SerializeToString())
    measurable = precision.measurable(lowered.kept)
    error, psnr = error_of(measurable), psnr_to(model, rest)(measurable) if rest else None
    table = out.with_name(f"{out.stem}{SUFFIX}")
    result = LoweredFile(path, table, lowered, len(precision.layers), before, dict(measured), error, psnr)
    write(table, _rows(result, variant, "x".join(map(str, samples[0][0].shape)), file.stat().st_size))
    return result


def lost(before: Points, after: Points) -> float:
    """How many points the worst metric lost; a metric that is missing afterwards lost all its points."""
    return max(value - after.get(metric, 0.0) for metric, value in before.items())


def measure(metric: Metric | None) -> Callable[[Path], Points] | None:
    """A metric of predictors as a metric of ONNX files."""
    return None if metric is None else lambda path: metric(file_predictor("onnx", path))


def tell(result: LoweredFile) -> bool:
    """Say what lower precision costs, and return whether that is little enough."""
    lowered, name = result.lowered, result.lowered.precision
    if result.before:
        tell_points(result.before, result.after, name)
    else:
        click.echo("there is no test data to decide by: name a config with its data")
    if result.psnr is not None:
        click.echo(f"{name} against float32, on pictures that set no ranges: PSNR {result.psnr:.1f} dB")
    worst = sorted(lowered.errors.items(), key=lambda item: item[1], reverse=True)[:5]
    print_table([(layer, f"{error:.1e}") for layer, error in worst], ("most changed layers", "error"), right=(1,))
    click.echo(f"the outputs change by {result.error:.1e}; {len(lowered.kept)} of {result.layers} layers in float32")
    for layer in lowered.kept:
        click.echo(f"  float32: {layer}")
    volume = f"{lowered.model.ByteSize() / 2**20:.1f} MiB"
    click.echo(f"written: {result.path} ({name}, {volume}) and {result.table.name}, the table of all layers")
    if not lowered.passed:
        click.echo(f"error: {name} costs {lowered.loss:.3g}, too much; the file keeps the suffix .failed", err=True)
    return lowered.passed


def tell_points(before: Points, after: Points, name: str) -> None:
    rows = [
        (metric, f"{value:.2f}", f"{after.get(metric, 0.0):.2f}", f"{after.get(metric, 0.0) - value:+.2f}")
        for metric, value in before.items()
    ]
    print_table(rows, (" or ".join(sorted(set(map(unit_of, before)))), "float32", name, "change"), right=(1, 2, 3))


def unit_of(metric: str) -> str:
    return "dB" if "psnr" in metric else "points"


def _rows(result: LoweredFile, variant: str, shape: str, volume: int) -> list[Row]:
    """The table of a file: its metrics, its size, and the error and the precision of each layer."""
    lowered = result.lowered
    last = about(torch.device("cpu"), "onnx", "onnxruntime")

    def row(dtype: str, metric: str, unit: str, value: float) -> Row:
        return Row("precision", variant, shape, dtype, "onnxruntime", metric, unit, value, value, value, *last)

    rows = [row("float32", metric, unit_of(metric), value) for metric, value in result.before.items()]
    rows += [row(lowered.precision, metric, unit_of(metric), value) for metric, value in result.after.items()]
    if result.psnr is not None:
        rows.append(row(lowered.precision, "PSNR against float32", "dB", result.psnr))
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

"""A TensorRT engine of a file in lower precision, compared with its float32 file.

The file says which layers are in lower precision; the engine is strongly typed and obeys it. So this proves on the GPU
the choice that arithmetic on a CPU made. It has not run on a GPU yet.
"""

from pathlib import Path

import click
import numpy as np
import onnx

from terrazzo._files import written_whole
from terrazzo.tools.export.precision.low import Half, Int8
from terrazzo.tools.export.precision.lowering import LoweredFile, Metric, lost, tell_points
from terrazzo.tools.export.tensorrt.engine import Engine, build
from terrazzo.tools.export.tensorrt.plan import Shape
from terrazzo.tools.predict.files import predictor
from terrazzo.tools.runtimes.onnx import open_onnx


def lowered_engine(
    result: LoweredFile,
    plain: Path,
    out: Path,
    shapes: dict[str, tuple[Shape, Shape, Shape]],
    samples: list,
    metric: Metric | None,
    tolerance: float,
) -> bool:
    """Build, measure and time the engine; say whether it loses little enough. If not, it is named `.failed`.

    Args:
        result: the file in lower precision.
        plain: the same file in float32.
        out: the engine's path.
        shapes: for each input, the smallest, the optimal and the largest shape.
        samples: the graph's inputs for images, one tuple per image.
        metric: measures it; None without data, then the largest error of an output decides.
        tolerance: how many points may be lost.

    Raises:
        InputError: TensorRT cannot build or run it.
    """
    serialised = build(result.path, shapes)
    outputs = [value.name for value in onnx.load(result.path, load_external_data=False).graph.output]
    engine = Engine(serialised, tuple(shapes), outputs)
    exact, facts, size = open_onnx(plain)
    name = result.lowered.precision
    if metric is None:
        error = max(
            float(np.abs(mine.numpy() - theirs.numpy()).max() / (np.abs(mine.numpy()).max() or 1.0))
            for mine, theirs in zip(exact(*samples[0]), engine(*samples[0]), strict=True)
        )
        # the limit is for mean errors; the largest error of one element is several times the mean
        passed = error <= 10 * {kind.name: kind.limit for kind in (Half, Int8)}[name]
        click.echo(f"the engine's outputs differ from float32 by {error:.1e} at most, relative to the largest value")
    else:
        after = metric(predictor(engine, facts, size))
        tell_points(result.before, after, f"{name} engine")
        passed = lost(result.before, after) <= tolerance
    path = out if passed else out.with_name(f"{out.name}.failed")
    with written_whole(path) as temporary:
        temporary.write_bytes(serialised)
    fast, median, slow = (f"{1e3 * seconds:.3f}" for seconds in engine.seconds(*samples[0]))
    click.echo(f"written: {path}; a run takes {median} ms on the GPU, the median ({fast} to {slow} from p20 to p80)")
    if not passed:
        click.echo("error: the engine loses too much; it keeps the suffix .failed", err=True)
    return passed

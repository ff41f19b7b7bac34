"""The steps of `terrazzo export`: choose a format, write and compare a file, print the result."""

from pathlib import Path

import click
from torch import Tensor

from terrazzo.errors import InputError
from terrazzo.tools.console import print_table
from terrazzo.tools.export.checked import Form, Report, checked_export
from terrazzo.tools.export.parity import Parity
from terrazzo.tools.export.targets import Exportable, metadata, noise
from terrazzo.tools.export.tensorrt.plan import trtexec

EXIT_PARITY = 1


def checked(
    writer: Form,
    ready: Exportable,
    batch: int,
    dynamic: tuple[str, ...],
    seen: tuple[str, Tensor],
    out: Path,
    kept: bool = True,
) -> Report:
    """Export, compare and print the result; a file that is not `kept` is only a step to another file."""
    height, width = ready.size
    report = checked_export(
        writer,
        ready.module,
        noise(ready.size, batch),
        out,
        checks=dict([seen]),
        reference=getattr(ready.module, "reference", None),
        output_names=ready.module.output_names,
        dynamic=dynamic,
        metadata=metadata(ready),
    )
    rows = [
        (parity.output, parity.source.replace("example", "noise"), parity, _verdict(parity))
        for parity in report.parities
    ]
    print_table(rows, ("output", "input", f"{writer.runtime} against PyTorch", "check"))
    sides = "HxW" if "hw" in dynamic else f"{height}x{width}"
    shape = f"{'B' if 'batch' in dynamic else batch}x3x{sides}"
    volume = f"{report.volume / 2**20:.1f} MiB"
    place = report.path if kept else "float32"
    click.echo(f"{'written' if kept else 'checked'}: {place} ({report.version}, {volume}; input: RGB 0..255, {shape})")
    if not report.passed:
        click.echo(
            f"error: {writer.runtime} and PyTorch disagree{'; the file keeps the suffix .failed' * kept}", err=True
        )
        if report.divergence is not None:
            click.echo(f"       {report.divergence}", err=True)
    elif not report.compared:
        click.echo(
            "warning: the model found nothing on any input, so its boxes were compared with nothing; name a picture "
            "that has something in it with --image FILE",
            err=True,
        )
    return report


def check_precision(name: str, form: str, batch: int, dynamic: tuple[str, ...]) -> None:
    """InputError if a file in lower precision is asked for that cannot be written or measured."""
    if form not in ("onnx", "tensorrt"):
        raise InputError(f"--{name} writes ONNX files, which OpenVINO reads too; use --format onnx instead of {form}")
    if batch > 1 and "batch" not in dynamic:
        raise InputError(f"--{name} is measured with one image per run: leave --batch out, or add --dynamic batch")


def form_of(name: str, opset: int | None, lacking: str | None) -> Form:
    """The format of that name; each needs its own package, and a TensorRT engine may be `lacking` something."""
    if name == "pt2":
        from terrazzo.tools.export.formats.pt2 import ProgramForm

        return ProgramForm()
    if name == "aoti":
        from terrazzo.tools.export.formats.aoti import CompiledForm

        return CompiledForm()
    if name == "openvino":
        from terrazzo.tools.export.formats.openvino import OpenVinoForm

        return OpenVinoForm(opset)
    from terrazzo.tools.export.formats.onnx import OnnxForm

    if name == "tensorrt" and lacking is None:
        from terrazzo.tools.export.tensorrt.engine import EngineForm

        return EngineForm(OnnxForm(opset))
    return OnnxForm(opset)


def without_engine(path: Path, lacking: str, shapes: dict) -> int:
    """Print the nodes that TensorRT does not document, or else how to build the engine on another machine."""
    import onnx

    from terrazzo.tools.export.tensorrt.operators import VERSION, problems

    found = problems(onnx.load(path))
    for problem in found:
        click.echo(f"TensorRT {VERSION} does not support {problem}", err=True)
    if found:
        click.echo(f"error: {len(found)} nodes are beyond TensorRT's documented operators", err=True)
        return EXIT_PARITY
    click.echo(f"every node is among the documented operators of TensorRT {VERSION}; no engine was built: {lacking}")
    click.echo(
        "on a machine with an NVIDIA GPU and the package tensorrt, this command builds, checks and times an engine;"
    )
    click.echo(f"to build it alone: {trtexec(path.name, f'{path.stem}.engine', shapes)}")
    return 0


def _verdict(parity: Parity) -> str:
    if not parity.passed:
        return "FAILED"
    return "passed" if parity.compared else "-"

"""One model of a family in every CPU runtime, against eager PyTorch: forward, on the images of families.py.

All have the same weights, images and number of threads. ONNX Runtime and OpenVINO run the file that `terrazzo export`
writes. OpenVINO is measured twice: in float32 like the others, and in its default, bfloat16 where the processor has it.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.bench.families import FAMILIES, Images
from terrazzo.tools.bench.verdicts import verdict
from terrazzo.tools.inspect.timing import FORWARD, Function, Late, Plan, SteadyTimer, Unavailable, attempt, interleaved

EAGER, COMPILED, ONNX, OPENVINO, OPENVINO_DEFAULT = "eager", "compiled", "onnxruntime", "openvino", "openvino default"
_SUFFIX = "_runtimes"
# Limits of max |difference| / max |eager|, by the dtype that a runtime computes in.
_LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # as OpenVINO calls them
# The target: ONNX Runtime takes at most eager's time.
_BOUND = 1.0


@dataclass(frozen=True)
class Case:
    """A family's model on a batch of images."""

    family: str
    images: Images

    @property
    def what(self) -> str:
        return f"{self.family}{_SUFFIX}"

    @property
    def shape(self) -> str:
        return f"{self.images.batch}x3x{self.images.height}x{self.images.width}"

    def __str__(self) -> str:
        return self.shape

    def holds(self, row: results.Row) -> bool:
        """Whether a row was measured on this case."""
        return (row.what, row.shape) == (self.what, self.shape)


def cases(name: str, plan: Plan) -> list[Case]:
    """What is measured.

    Raises:
        InputError: The plan asks for other things than forward passes on a CPU.
    """
    if plan.device.type != "cpu":
        raise InputError(f"{name} compares runtimes of the CPU; give --device cpu")
    if plan.passes not in ((), (FORWARD,)):
        raise InputError(f"{name} compares exported files, which have no backward pass; leave --pass out")
    family = name.removesuffix(_SUFFIX)
    images = FAMILIES[family].cpu
    return [Case(family, batch) for batch in (images[:1] if plan.quick else images)]


def _eager(model: nn.Module, images: torch.Tensor) -> Function:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(images)

    return run


def _onnxruntime(path: Path, images: torch.Tensor) -> Function:
    from terrazzo.tools.runtimes.onnx import open_onnx

    run, *_ = open_onnx(path, torch.get_num_threads())
    return lambda: run(images)[0]


def _openvino(path: Path, images: torch.Tensor, default: bool) -> Function:
    from terrazzo.tools.runtimes.openvino import FLOAT32, open_openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads()} | ({} if default else FLOAT32)
    run, *_ = open_openvino(path, settings)
    return lambda: run(images)[0]


class _File:
    """The exported file of a model, written when it is first needed."""

    def __init__(self, model: nn.Module, images: torch.Tensor, path: Path):
        self.model, self.images, self.path = model, images, path
        self.fault: str | None = None  # empty if there is no fault; None before it is known

    def __call__(self) -> Path:
        if self.fault is None:
            self.fault = self._write()
        if self.fault:
            raise Unavailable(self.fault)
        return self.path

    def _write(self) -> str:
        from terrazzo.tools.export.formats.onnx import export_onnx

        try:
            report = export_onnx(self.model, self.images, self.path)
        except InputError as error:
            return str(error)
        return "" if report.passed else f"the exported file differs from PyTorch: relative error {report.worst:.1e}"


def _functions(model: nn.Module, images: torch.Tensor, file: _File, plan: Plan) -> dict[str, Function]:
    """By runtime, one call of the model."""
    placed = images.to(memory_format=torch.channels_last)  # like the model, and like the images in backbones.py
    functions = {EAGER: _eager(model, placed)}
    if plan.compiled is not False:
        functions[COMPILED] = _eager(torch.compile(model, dynamic=False), placed)
    functions[ONNX] = Late(lambda: _onnxruntime(file(), images))
    functions[OPENVINO] = Late(lambda: _openvino(file(), images, default=False))
    functions[OPENVINO_DEFAULT] = Late(lambda: _openvino(file(), images, default=True))
    return functions


def _dtype(runtime: str) -> str:
    """The dtype that a runtime computes in on this processor."""
    if runtime != OPENVINO_DEFAULT:
        return "float32"
    from terrazzo.tools.runtimes.openvino import core

    name = core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return _DTYPES.get(name, name)


def _fault(runtime: str, wanted: torch.Tensor, found: torch.Tensor) -> str | None:
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    limit = _LIMITS[_dtype(runtime)]
    return None if error <= limit else f"its output is wrong: relative error {error:.1e}, limit {limit:.0e}"


def measure(case: Case, plan: Plan) -> tuple[list[results.Row], dict[str, str]]:
    """Check every runtime against eager PyTorch on a case, then time them in turns.

    Returns:
        The rows, and a reason for each runtime without rows.
    """
    family = FAMILIES[case.family]
    torch.manual_seed(0)
    torch.compiler.reset()  # otherwise a model would run uncompiled after as many shapes as Dynamo caches
    model = timm.create_model(family.model).eval().to(memory_format=torch.channels_last)
    images = torch.randn(case.images.batch, 3, case.images.height, case.images.width)
    with torch.no_grad():
        wanted = model(images)
    functions, reasons = {}, {}
    with tempfile.TemporaryDirectory(prefix="terrazzo-bench-") as folder:
        file = _File(model, images, Path(folder) / "model.onnx")
        for runtime, function in _functions(model, images, file, plan).items():
            made, wanting = attempt({runtime: function}, partial(_fault, runtime, wanted))
            functions |= made
            reasons |= wanting
        times = interleaved(functions, plan.seconds, SteadyTimer())
    about = results.about(plan.device, "timm", "onnxruntime", "openvino")
    rows = [
        results.Row(
            case.what,
            family.model,
            case.shape,
            _dtype(runtime),
            runtime,
            FORWARD,
            "ms",
            *(1e3 * t for t in times[runtime]),
            *about,
        )
        for runtime in times
    ]
    return rows, reasons


def _times(rows: list[results.Row]) -> dict[str, dict[str, float]]:
    """Milliseconds by runtime, by shape."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.shape, {})[row.backend] = row.p50
    return found


def table(rows: list[results.Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines: eager's time, and how many times as long the others take."""
    dtype = next((row.dtype for row in rows if row.backend == OPENVINO_DEFAULT), "")
    names = {
        COMPILED: "torch.compile",
        ONNX: "ONNX Runtime",
        OPENVINO: "OpenVINO in float32",
        OPENVINO_DEFAULT: f"OpenVINO by default ({dtype})" if dtype else "OpenVINO by default",
    }
    lines = [
        (
            shape,
            results.milliseconds(times.get(EAGER), 1),
            *(results.ratio(times.get(runtime), times.get(EAGER), 2) for runtime in names),
        )
        for shape, times in _times(rows).items()
    ]
    return ("images", f"{rows[0].variant}, eager, ms", *(f"{name} takes" for name in names.values())), lines


def verdicts(rows: list[results.Row], device: str) -> list[str]:
    """Whether ONNX Runtime is as fast as eager PyTorch."""
    ratios = {
        shape: times[ONNX] / times[EAGER] for shape, times in _times(rows).items() if {ONNX, EAGER} <= times.keys()
    }
    return [verdict(f"{rows[0].variant}, {ONNX}", ratios, _BOUND, True, "x the time of eager PyTorch")]

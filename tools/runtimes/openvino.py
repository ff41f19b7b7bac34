"""OpenVINO's own files and ONNX files, run by OpenVINO on the CPU."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch
from torch import Tensor

from terrazzo.errors import InputError
from terrazzo.tools.runtimes import Opened
from terrazzo.tools.runtimes.scan_loops import loops_for_scans

# By default OpenVINO takes bfloat16 where a processor can, which costs two digits.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@cache
def core() -> openvino.Core:
    """The one core of this process.

    A core gives the thread a signal stack, and restores the previous stack when it is destroyed. With two cores, the
    first core is destroyed first, the second restores a stack that is gone, and the next signal that Python handles (a
    child's end, Ctrl-C) kills the process.
    """
    return openvino.Core()


def readable(path: Path) -> Path | bytes:
    """A model's file, or the bytes to read in its place: OpenVINO knows ONNX's Loop, but not its Scan."""
    if path.suffix == ".onnx":
        graph = onnx.load(path)
        if loops_for_scans(graph):
            return graph.SerializeToString()
    return path


def open_openvino(path: Path, settings: Mapping[str, Any] = FLOAT32) -> Opened:
    """A file in OpenVINO on the CPU; see `Opened`.

    Args:
        path: an IR or an ONNX file; OpenVINO reads both.
        settings: OpenVINO's settings for the CPU.

    Raises:
        InputError: OpenVINO cannot load it.
    """
    try:
        model = core().read_model(readable(path))
        compiled = core().compile_model(model, "CPU", dict(settings))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1]
        raise InputError(f"OpenVINO cannot load {path.name}: {reason}") from error

    def run(*arguments: Tensor) -> list[Tensor]:
        found = compiled([value.numpy() for value in arguments])
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    info = model.get_rt_info()
    facts = {key: value.astype(str) for key, value in info["terrazzo"].items()} if "terrazzo" in info else {}
    sides = model.inputs[0].partial_shape[2:]
    size = tuple(side.get_length() for side in sides) if sides.is_static else None
    return run, facts, size

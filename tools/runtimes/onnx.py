"""ONNX files, run by ONNX Runtime."""

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from terrazzo.errors import InputError, first_line
from terrazzo.tools.runtimes import Opened


def open_onnx(path: Path, threads: int | None = None) -> Opened:
    """An ONNX file in ONNX Runtime on the CPU; see `Opened`.

    Args:
        path: the file.
        threads: number of threads per operation; None leaves it to ONNX Runtime.

    Raises:
        InputError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise InputError(f"ONNX Runtime cannot load {path.name}: {first_line(error)}") from error
    names = [value.name for value in session.get_inputs()]

    def run(*arguments: Tensor) -> list[Tensor]:
        feeds = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
        return [torch.as_tensor(output) for output in session.run(None, feeds)]

    sides = session.get_inputs()[0].shape[-2:]
    size = tuple(sides) if all(isinstance(side, int) for side in sides) else None
    return run, dict(session.get_modelmeta().custom_metadata_map), size

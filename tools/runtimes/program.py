"""PyTorch's own exported programs, run by PyTorch without the model's code."""

import zipfile
from pathlib import Path

import torch
import torchvision  # noqa: F401  programs of detectors call its operators
from torch import Tensor

from terrazzo.errors import InputError
from terrazzo.tools.runtimes import Opened, as_tuple, loading


def open_program(path: Path) -> Opened:
    """A `torch.export` program; see `Opened`.

    Raises:
        InputError: PyTorch cannot load it as a program.
    """
    if zipfile.is_zipfile(path) and any("aotinductor" in name for name in zipfile.ZipFile(path).namelist()):
        raise InputError(f"{path.name} was exported with --format aoti; run it with --runtime aoti")
    facts = {"task": ""}  # PyTorch fills it with all facts, but only if it is not empty
    with loading(path, "torch.export"):
        program = torch.export.load(path, extra_files=facts)
    module, image = program.module(), program.graph_signature.user_inputs[0]
    sides = next(node.meta["val"].shape[-2:] for node in program.graph.nodes if node.name == image)
    size = tuple(sides) if all(isinstance(side, int) for side in sides) else None

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(module(*arguments))

    return run, facts, size

"""Models that AOTInductor compiled, run without the model's code or a compiler."""

from pathlib import Path

import torch
import torchvision  # noqa: F401  packages of detectors call its operators
from torch import Tensor
from torch._inductor import aoti_load_package

from terrazzo.tools.runtimes import Opened, as_tuple, loading


def open_package(path: Path) -> Opened:
    """A package of AOTInductor; see `Opened`.

    Raises:
        InputError: it is not a package that can be loaded here.
    """
    with loading(path, "AOTInductor"):
        module = aoti_load_package(str(path))
    facts = module.get_metadata()
    size = tuple(map(int, facts["size"].split("x"))) if "size" in facts else None

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        # The library assumes the strides of the example.
        with torch.no_grad():
            return as_tuple(module(*(value.contiguous() for value in arguments)))

    return run, facts, size

"""Exported files, opened: each becomes a function of tensors, whatever runtime runs it.

A module opens the files of one runtime and imports that runtime: `onnx` (ONNX Runtime), `openvino`, `program`
(torch.export) and `package` (AOTInductor). Exporters compare a new file through these modules; predictions use only
them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from terrazzo.errors import InputError, first_line

Opened = tuple[Callable[..., Sequence[Tensor]], Mapping[str, str], tuple[int, int] | None]
"""A file as a function of tensors, what it says about itself, and H, W of its images; None if these are open."""


def open_file(runtime: str, path: Path) -> Opened:
    """Open an exported file.

    Args:
        runtime: "onnx", "openvino", "pt2" or "aoti"; each needs its own package.
        path: the file.

    Raises:
        InputError: the runtime cannot load it.
    """
    if runtime == "onnx":
        from terrazzo.tools.runtimes.onnx import open_onnx as opener
    elif runtime == "openvino":
        from terrazzo.tools.runtimes.openvino import open_openvino as opener
    elif runtime == "pt2":
        from terrazzo.tools.runtimes.program import open_program as opener
    else:
        from terrazzo.tools.runtimes.package import open_package as opener
    return opener(path)


def as_tuple(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A program's result, as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


@contextlib.contextmanager
def loading(path: Path, reader: str) -> Iterator[None]:
    """Turn PyTorch's messages and errors about a file that it cannot load into an InputError of one line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:  # a wrong kind of file or version fails in many ways
        raise InputError(f"{reader} cannot load {path.name}: {first_line(error)}") from error
    finally:
        logging.disable(before)

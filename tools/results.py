"""Measured numbers as rows of CSV files, in the long form that every table is made from."""

import contextlib
import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from terrazzo._files import written_whole
from terrazzo.errors import InputError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "model_cards" / "results"


@dataclass(frozen=True)
class Row:
    """One number: what was measured, on what, where, and its spread (p20 = p50 = p80 without spread)."""

    what: str
    variant: str
    shape: str
    dtype: str
    backend: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    device: str
    versions: str
    commit: str


R = TypeVar("R")


def read(path: Path, kind: type[R] = Row) -> list[R]:
    """The rows of a file.

    Args:
        kind: a dataclass; its fields, strings and floats, are the columns.

    Raises:
        InputError: The file is not a table of this kind.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [field.name for field in fields(kind)]:
            raise InputError(f"{path} is not a table of results: its columns are {reader.fieldnames}")
        return [kind(**{field.name: field.type(row[field.name]) for field in fields(kind)}) for row in reader]


def write(path: Path, rows: Iterable[R], kind: type[R] = Row) -> None:
    """Write a whole file, or nothing; `kind` as in `read`."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(kind))
        writer.writerows([_text(x) for x in astuple(row)] for row in rows)


def _text(value: str | float) -> str:
    """Counts in full, measurements to five digits."""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:.5g}"


def device_name(device: "torch.device | None" = None) -> str:
    """A GPU's name, or the processor's with the threads in use; by default the GPU's if there is a GPU."""
    import torch  # not above: reading tables needs no PyTorch

    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not say
    return f"{name}, {torch.get_num_threads()} threads"


def versions(*packages: str) -> str:
    """torch's version, and the versions of these packages if installed."""
    import torch

    said = [f"torch {torch.__version__}"]
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            said.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(said)


def about(device: "torch.device", *packages: str) -> tuple[str, str, str]:
    """The last columns of a row measured now: device, versions, commit."""
    return device_name(device), versions(*packages), commit()


def commit() -> str:
    """The commit of this checkout; empty outside a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def milliseconds(time: float | None, digits: int = 2) -> str:
    """A cell of a table."""
    return "not run" if time is None else f"{time:.{digits}f}"


def ratio(time: float | None, ours: float | None, digits: int = 1) -> str:
    """A cell of a table: a time as a multiple of ours."""
    return "not run" if time is None or ours is None else f"{time / ours:.{digits}f} x"

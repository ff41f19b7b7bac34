"""Measured numbers as rows of CSV files, in the long form that every table is made from."""

import csv
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from time import perf_counter

import torch

from terrazzo._files import written_whole
from terrazzo.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "model_cards" / "results"


@dataclass(frozen=True)
class Row:
    """One number: what was measured, on what, where, and its spread (p20 = p50 = p80 where there is none)."""

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


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        InputError: The file is not such a table.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [field.name for field in fields(Row)]:
            raise InputError(f"{path} is not a table of results: its columns are {reader.fieldnames}")
        return [
            Row(**{key: float(text) if key in ("p20", "p50", "p80") else text for key, text in row.items()})
            for row in reader
        ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a whole file, or nothing."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows([_text(x) for x in astuple(row)] for row in rows)


def _text(value: str | float) -> str:
    """Counts in full, measurements to five digits."""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:.5g}"


def device_name() -> str:
    """This machine's processor, or its GPU, with the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not say
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> str:
    return f"torch {torch.__version__}"


def commit() -> str:
    """The commit of this checkout, or nothing outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def interleaved(
    functions: dict[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, tuple[float, float, float]]:
    """Time functions in turns, so that a noisy machine disturbs all alike.

    Returns:
        Per name p20, p50 and p80 in seconds, of at least 5 turns.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = perf_counter() + seconds * len(functions)
    while perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = perf_counter()
            function()
            times[name].append(perf_counter() - start)
    cuts = {name: statistics.quantiles(values, n=5) for name, values in times.items()}
    return {name: (cut[0], statistics.median(times[name]), cut[3]) for name, cut in cuts.items()}

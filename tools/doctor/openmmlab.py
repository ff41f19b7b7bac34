"""`terrazzo doctor openmmlab`: builds the model of every config of OpenMMLab's packages; says which can be built."""

import csv
import fnmatch
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import click

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.doctor.faults import FAULTS
from terrazzo.tools.processes import pool
from terrazzo.tools.reports import zoo as zoo_results
from terrazzo.tools.reports.zoo import BUILT, DISTRIBUTIONS, FAILED, FAULTY, LACKS, NO_MODEL, Examined, Finding

REQUIRED = ("mmdet", "mmseg")
"""The packages that `terrazzo[openmmlab]` installs; the others count where they are installed."""


@click.command()
@click.option("--package", type=click.Choice(list(DISTRIBUTIONS)), help="Only the configs of this package.")
@click.option(
    "--configs", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder of your own instead."
)
@click.option("--only", metavar="PATTERN", help="Only the configs whose path matches this glob, such as 'yolox/*'.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write a CSV row for every config.")
@click.option(
    "--results",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Write the counts to this folder, for the table in docs/openmmlab.md; packages not examined keep theirs.",
)
def command(package: str | None, configs: Path | None, only: str | None, out: Path | None, folder: Path | None) -> int:
    """Build every model config that the installed OpenMMLab packages ship; say which cannot be built, and why.

    Weights are neither filled nor downloaded. A config that needs another package, or that is faulty as shipped, is
    named, and the exit code stays 0. Any other config that cannot be built, or that lacks an operator, makes it 1.
    """
    if package and configs:
        raise InputError("--package and --configs both say where to look; give one of them")
    if folder is not None and (configs or only):
        raise InputError("--results counts whole packages; leave out --configs and --only")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    paths = _selected(_folders(package, configs), only)
    rows = list(_examined(paths))
    if out is not None:
        _write(out, rows)
    _report(rows)
    if folder is not None:
        _keep_counts(folder / zoo_results.PATH.name, rows)
        click.echo(f"wrote {folder / zoo_results.PATH.name}")
    return int(any(row.finding.status in (LACKS, FAILED) for row in rows))


def _folders(package: str | None, configs: Path | None) -> dict[str, Path]:
    """The folders to look in, by the name of the package (or of the folder).

    Raises:
        ModuleNotFoundError: a package is not installed.
        InputError: a package is installed without its configs.
    """
    if configs is not None:
        return {configs.resolve().name: configs.resolve()}
    folders = {}
    for name in [package] if package else DISTRIBUTIONS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            if name in REQUIRED:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if package:
                raise InputError(f"{name} is not installed; docs/openmmlab.md has the command that installs it")
            continue
        folders[name] = Path(spec.origin).parent / ".mim" / "configs"
        if not folders[name].is_dir():
            raise InputError(f"{name} is installed without its configs ({folders[name]}); install it from its wheel")
    return folders


def _selected(folders: dict[str, Path], only: str | None) -> list[tuple[str, str, Path]]:
    """Package, path inside the folder, and path of every config; `_base_` and `_base_NAME.py` are parts of configs."""
    found = [
        (package, path.relative_to(folder).as_posix(), path)
        for package, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
        if "_base_" not in path.relative_to(folder).parts and not path.name.startswith("_base_")
    ]
    chosen = [item for item in found if only is None or fnmatch.fnmatchcase(item[1], only)]
    if not chosen:
        where = ", ".join(map(str, folders.values()))
        raise InputError(f"none of the {len(found)} configs in {where} matches {only or '*.py'!r}")
    return chosen


def _examined(paths: list[tuple[str, str, Path]]) -> Iterator[Examined]:
    """Examines configs one by one, each distinct model once."""
    from terrazzo.tools.doctor import zoo  # mmengine takes seconds to import

    known: dict[str, Finding] = {}
    worker = Worker(zoo.prepare)
    try:
        with progress("building", total=len(paths)) as bar:
            for package, config, path in paths:
                model = worker.call(zoo.identify, path) or ""
                if model in known:
                    finding = known[model]
                else:
                    finding = _fault(package, config) or worker.call(zoo.examine, path)
                    finding = finding or Finding(FAILED, "the interpreter crashed")
                if model:
                    known[model] = finding
                yield Examined(package, config, finding, model)
                bar.advance(bar.task_ids[0])
    finally:
        worker.close()


def _fault(package: str, config: str) -> Finding | None:
    """The fault that is known of a config in the installed release; such a config is not built."""
    if package not in DISTRIBUTIONS:
        return None
    release = importlib.metadata.version(DISTRIBUTIONS[package])
    fault = FAULTS.get((package, release), {}).get(config)
    return Finding(FAULTY, fault) if fault else None


class Worker:
    """Calls functions in a separate process, and replaces the process if it dies."""

    def __init__(self, prepare: Callable[[], None]):
        self.prepare = prepare
        self.pool = pool(1, self.prepare)

    def call(self, function: Callable, *args: Any) -> Any:
        """The function's value; None if the call killed the process."""
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.close()
            self.pool = pool(1, self.prepare)
            return None

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _write(path: Path, rows: list[Examined]) -> None:
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("package", "config", "status", "reason"))
        writer.writerows((row.package, row.config, row.finding.status, row.finding.reason) for row in rows)


def _keep_counts(path: Path, rows: list[Examined]) -> None:
    """Writes the counts of the examined packages, and keeps those of packages that are not installed here."""
    counts = zoo_results.count(rows)
    old = results.read(path) if path.is_file() else []
    packages: dict[str, list[results.Row]] = {}
    for row in (*(row for row in old if row.variant not in {new.variant for new in counts}), *counts):
        packages.setdefault(row.variant, []).append(row)
    results.write(path, [row for name in sorted(packages, key=list(DISTRIBUTIONS).index) for row in packages[name]])


def _report(rows: list[Examined]) -> None:
    """Print which configs were not built, the counts, and which operators exist."""
    from terrazzo.tools.doctor.operators import all_operators

    troubles = [
        (row.finding.status, f"{row.package}/{row.config}", row.finding.reason)
        for row in rows
        if row.finding.status not in (BUILT, NO_MODEL)
    ]
    if troubles:
        print_table(sorted(troubles), ("status", "config", "reason"))
        click.echo()
    counts = zoo_results.count(rows)
    head, lines = zoo_results.table(counts)
    print_table(lines, head, right=tuple(range(1, len(head))))
    click.echo("\n".join(zoo_results.notes(counts)))
    operators = all_operators()
    for provided, verb in ((True, "provided"), (False, "not provided")):
        names = [name for name, there in operators.items() if there == provided]
        if names:
            click.echo(f"mmcv operators {verb} ({len(names)}): {', '.join(names)}.")

"""`terrazzo list`: one row per model."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import click

from terrazzo.errors import InputError
from terrazzo.tools import catalogue, results
from terrazzo.tools.console import print_table
from terrazzo.tools.reports.cards import COUNTS


@click.command()
@click.argument("pattern", required=False)
@click.option("--family", help="Only the models of this family, such as dinat or rgt.")
def command(pattern: str | None, family: str | None) -> None:
    """Name terrazzo's models.

    Backbones come with parameters, the authors' ImageNet-1K top-1 and the input size, restoration networks with
    parameters, the scale of their pictures and their tasks. PATTERN is a part of the name, or a glob such as 'dinat_*'.
    """
    entries = catalogue.entries()
    if family is not None:
        families = sorted({entry.family for entry in entries})
        if family not in families:
            raise InputError(f"no family is called {family!r}; the families are: {', '.join(families)}")
        entries = [entry for entry in entries if entry.family == family]
    if pattern is not None:
        glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
        found = [entry for entry in entries if fnmatch.fnmatchcase(entry.model, glob)]
        if not found:
            raise InputError(f"none of the {len(entries)} models matches {pattern!r}; `terrazzo list` names them all")
        entries = found
    counted = {
        row.variant: int(row.p50)
        for path in COUNTS.values()
        for row in results.read(path)
        if row.metric == "parameters"
    }
    backbones = [entry for entry in entries if not entry.scale]
    restorers = [entry for entry in entries if entry.scale]
    if backbones:
        _print(backbones, counted, {"top-1 (%)": lambda entry: entry.top1, "input": lambda entry: entry.input})
        click.echo("top-1: published by the authors for their own weights, ImageNet-1K validation")
    if backbones and restorers:
        click.echo()
    if restorers:
        _print(restorers, counted, {"scale": lambda entry: f"x{entry.scale}", "tasks": lambda entry: entry.tasks})


def _print(
    entries: Sequence[catalogue.Entry],
    counted: Mapping[str, int],
    columns: Mapping[str, Callable[[catalogue.Entry], str]],
) -> None:
    """A table of models; parameters that are not stored are counted, which takes a moment per model."""
    rows = []
    for entry in entries:
        params = counted.get(entry.model)
        if params is None:
            from terrazzo.tools.models import build_on_meta

            params = sum(p.numel() for p in build_on_meta(entry.model).parameters())
        cells = (cell(entry) for cell in columns.values())
        rows.append((entry.model, entry.family, f"{params / 1e6:.2f}", *cells, entry.licence))
    print_table(rows, ("model", "family", "params (M)", *columns, "weights' licence"), right=(2, 3, 4))

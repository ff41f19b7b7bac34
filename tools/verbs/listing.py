"""`terrazzo list`: one row per model."""

import fnmatch

import click

from terrazzo.errors import InputError
from terrazzo.tools import catalogue, results
from terrazzo.tools.console import print_table
from terrazzo.tools.reports.cards import MODELS


@click.command()
@click.argument("pattern", required=False)
@click.option("--family", help="Only the models of this family, such as dinat.")
def command(pattern: str | None, family: str | None) -> None:
    """Name terrazzo's backbones: parameters, the authors' ImageNet-1K top-1, input size.

    PATTERN is a part of the name, or a glob such as 'dinat_*'.
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
    counted = {row.variant: int(row.p50) for row in results.read(MODELS) if row.metric == "parameters"}
    rows = [_row(entry, counted.get(entry.model)) for entry in entries]
    print_table(rows, ("model", "family", "params (M)", "top-1 (%)", "input", "weights' licence"), right=(2, 3, 4))
    click.echo("top-1: published by the authors for their own weights, ImageNet-1K validation")


def _row(entry: catalogue.Entry, params: int | None) -> tuple:
    """A model's cells; parameters that are not stored are counted, which takes a moment per model."""
    if params is None:
        from terrazzo.tools.models import build_on_meta

        params = sum(p.numel() for p in build_on_meta(entry.model).parameters())
    return entry.model, entry.family, f"{params / 1e6:.2f}", entry.top1, entry.input, entry.licence

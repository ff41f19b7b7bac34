"""`terrazzo list`: one row per model."""

import fnmatch

import click

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.console import print_table
from terrazzo.tools.models import NO_WEIGHTS, build_on_meta, pretrained_cfg, published_top1, registered_models
from terrazzo.tools.reports.cards import MODELS


@click.command()
@click.argument("pattern", required=False)
@click.option("--family", help="Only the models of this family, such as dinat.")
def command(pattern: str | None, family: str | None) -> None:
    """Name terrazzo's models: parameters, the authors' ImageNet-1K top-1, input size.

    PATTERN is a part of the name, or a glob such as 'dinat_*'.
    """
    models = registered_models()
    if family is not None:
        families = sorted(set(models.values()))
        if family not in families:
            raise InputError(f"no family is called {family!r}; the families are: {', '.join(families)}")
        models = {name: member for name, member in models.items() if member == family}
    if pattern is not None:
        glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
        found = {name: member for name, member in models.items() if fnmatch.fnmatchcase(name, glob)}
        if not found:
            raise InputError(f"none of the {len(models)} models matches {pattern!r}; `terrazzo list` names them all")
        models = found
    counted = {row.variant: int(row.p50) for row in results.read(MODELS) if row.metric == "parameters"}
    rows = [_row(name, member, counted.get(name)) for name, member in models.items()]
    print_table(rows, ("model", "family", "params (M)", "top-1 (%)", "input", "weights' licence"), right=(2, 3, 4))
    click.echo("top-1: published by the authors for their own weights, ImageNet-1K validation")


def _row(name: str, family: str, params: int | None) -> tuple:
    """A model's facts; parameters that are not stored are counted, which takes a moment per model."""
    cfg = pretrained_cfg(name)
    if params is None:
        params = sum(p.numel() for p in build_on_meta(name).parameters())
    top1 = published_top1(cfg)
    size = "x".join(map(str, cfg.input_size[1:]))
    return name, family, f"{params / 1e6:.2f}", None if top1 is None else f"{top1:.1f}", size, cfg.license or NO_WEIGHTS

"""`terrazzo bench`: speed of an operator here, as ratios to named peers measured in the same run."""

import importlib
from pathlib import Path

import click

from terrazzo.errors import InputError

# One entry per operator: its module of this package, with `run(seconds) -> list[Row]` and `table(rows)`.
BENCHMARKS = {"neighborhood_attention": "terrazzo.tools.bench_neighborhood_attention"}


@click.command()
@click.argument("operator")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=2.0, help="Time for each figure.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows as CSV.")
def command(operator: str, seconds: float, out: Path | None) -> None:
    """Measure OPERATOR against its peers on this machine."""
    if operator not in BENCHMARKS:
        raise InputError(f"no benchmark is called {operator!r}; the benchmarks are: {', '.join(BENCHMARKS)}")
    from terrazzo.tools import results
    from terrazzo.tools.console import print_table

    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    module = importlib.import_module(BENCHMARKS[operator])
    rows = module.run(seconds)
    head, lines = module.table(rows)
    print_table(lines, head, right=tuple(range(2, len(head))))
    click.echo(f"{results.device_name()}; {results.versions()}; median times, measured in turns")
    if out is not None:
        results.write(out, rows)
        click.echo(f"wrote {out}")

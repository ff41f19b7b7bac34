"""`terrazzo test`: the metrics of a checkpoint on its config's test data."""

import json
from pathlib import Path
from typing import Any

import click

from terrazzo._files import written_whole
from terrazzo.tools.console import print_table
from terrazzo.tools.files import check_output_file
from terrazzo.tools.options import UserPath, config_options
from terrazzo.tools.training.evaluation import evaluate, without_nan


@click.command()
@click.argument("config")
@click.argument("checkpoint", type=UserPath())
@config_options
@click.option("--out", type=UserPath(), metavar="FILE", help="Write the metrics as JSON too.")
def command(config: str, checkpoint: Path, overrides: dict, data_root: Path | None, out: Path | None) -> None:
    """Evaluate CHECKPOINT on the test data of CONFIG and print its metrics."""
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools.data.checks import check_data

    cfg = load_config(config, data_root, overrides)
    check_data(cfg, ("test",))
    if out is not None:
        check_output_file(out)
    metrics, notes = evaluate(cfg, checkpoint)
    if metrics:
        print_table(((name, _cell(value)) for name, value in metrics.items()), ("metric", "value"), right=(1,))
    for note in notes:
        click.echo(note)
    if out is not None:
        record = {"config": config, "checkpoint": str(checkpoint), **without_nan(metrics)}
        with written_whole(out) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

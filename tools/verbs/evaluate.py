"""`terrazzo test`: the metrics of a checkpoint on its config's test data."""

import json
from pathlib import Path

import click

from terrazzo._files import written_whole
from terrazzo.tools.console import print_table
from terrazzo.tools.files import check_output_file
from terrazzo.tools.options import config_options
from terrazzo.tools.training.evaluation import evaluate


@click.command()
@click.argument("config")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@config_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the metrics as JSON too.")
def command(config: str, checkpoint: Path, overrides: dict, data_root: Path | None, out: Path | None) -> None:
    """Evaluate CHECKPOINT on the test data of CONFIG and print its metrics."""
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools.data.checks import check_data

    cfg = load_config(config, data_root, overrides)
    check_data(cfg, ("test",))
    if out is not None:
        check_output_file(out)
    metrics = evaluate(cfg, checkpoint)
    print_table(((name, f"{value:.4g}") for name, value in metrics.items()), ("metric", "value"), right=(1,))
    if out is not None:
        with written_whole(out) as temporary:
            temporary.write_text(
                json.dumps({"config": config, "checkpoint": str(checkpoint), **metrics}, indent=2) + "\n"
            )

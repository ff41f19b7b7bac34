"""`terrazzo test`: the metrics of a checkpoint on its config's test data."""

import copy
import json
import tempfile
from pathlib import Path

import click

from terrazzo._files import written_whole
from terrazzo.tools.console import print_table, progress
from terrazzo.tools.files import check_output_file
from terrazzo.tools.options import config_options


@click.command()
@click.argument("config")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@config_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the metrics as JSON too.")
def command(config: str, checkpoint: Path, overrides: dict, data_root: Path | None, out: Path | None) -> None:
    """Evaluate CHECKPOINT on the test data of CONFIG and print its metrics."""
    from terrazzo.openmmlab.config import load_config
    from terrazzo.tools.data_checks import check_data

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


def evaluate(cfg, checkpoint: Path) -> dict[str, float]:
    """The metrics of a checkpoint on a config's test data; nothing is printed and no work dir is left behind.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.

    Raises:
        InputError: the config has no test data, or the checkpoint does not fit.
    """
    from terrazzo.errors import InputError
    from terrazzo.openmmlab.config import build_runner
    from terrazzo.tools import mm

    if not cfg.get("test_dataloader") or not cfg.get("test_evaluator"):
        raise InputError(f"config {cfg.filename} has no test_dataloader and test_evaluator; there is nothing to test")
    with mm.quiet():
        # mmengine loads what fits and goes on: this is where a checkpoint that does not fit is refused.
        mm.build_model(cfg, checkpoint)
        cfg = copy.deepcopy(cfg)
        mm.without_weights(cfg.model)
        with tempfile.TemporaryDirectory() as scratch, progress("testing") as bar:
            runner = build_runner(cfg, scratch, load_from=checkpoint)
            runner.register_hook(mm.Ticker(bar))
            metrics = runner.test()
    return {name: round(float(value), 4) for name, value in metrics.items()}

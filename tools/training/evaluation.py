"""The metrics of a checkpoint on its config's test data."""

import copy
import tempfile
from pathlib import Path

from terrazzo.tools.console import progress


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

"""Train a tiny classifier in one of several processes, and write the losses.

Usage: distributed_worker.py SETTINGS.json, with the keys `config`, `root`, `work_dir`, `options` and `arguments`.
"""

import json
import os
import sys
from pathlib import Path

from mmengine.hooks import Hook

from terrazzo.openmmlab.config import build_runner, load_config


class Losses(Hook):
    """Keep the loss of this process at each iteration."""

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append(float(outputs["loss"]))


def train(config: str, root: str, work_dir: str, options: dict, arguments: dict) -> list[float]:
    """Train, and return the losses of this process."""
    runner = build_runner(load_config(config, root, options), work_dir, **arguments)
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    return losses.values


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    losses = train(**settings)
    Path(settings["work_dir"], f"losses_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(losses))

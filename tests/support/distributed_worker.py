"""One of several processes, or the only one: trains a tiny classifier and writes its losses.

Usage: distributed_worker.py SETTINGS.json, with the keys `config`, `root`, `work_dir`, `options` and `arguments`.
"""

import json
import os
import sys
from pathlib import Path

from mmengine.hooks import Hook

from terrazzo.openmmlab.config import build_runner, load_config


class Losses(Hook):
    """Keeps the loss of this process at each iteration."""

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append(float(outputs["loss"]))


settings = json.loads(Path(sys.argv[1]).read_text())
cfg = load_config(settings["config"], settings["root"], settings["options"])
runner = build_runner(cfg, settings["work_dir"], **settings["arguments"])
losses = Losses()
runner.register_hook(losses)
runner.train()
Path(settings["work_dir"], f"losses_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(losses.values))

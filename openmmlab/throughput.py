"""Images per second and memory, in the log beside the loss."""

import resource
import sys
import time
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from terrazzo.openmmlab.seeding import ranks_per_image


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs `images_per_second`, over all processes, and `memory_mib`, of the GPU or else of the process.

    The memory is the peak so far. The time is measured between the ends of two iterations: it includes data loading and
    saving, but not validation.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Counts the batch: the last of an epoch may be smaller."""
        inputs = data_batch["inputs"] if isinstance(data_batch, dict) else data_batch[0]
        self.images = len(inputs) if not isinstance(inputs, dict) else len(next(iter(inputs.values())))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Passes both figures to the log."""
        now = time.perf_counter()
        images = self.images * get_world_size() / ranks_per_image(runner.model)
        runner.message_hub.update_scalar("train/images_per_second", images / max(now - self.start, 1e-9))
        runner.message_hub.update_scalar("train/memory_mib", _memory())
        self.start = now

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Excludes the time of a validation between two iterations."""
        self.start = time.perf_counter()


def _memory() -> float:
    """The peak memory in use, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # the system call counts bytes there and KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

"""Weights & Biases as a log: numbers and settings, and no copies of source files."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend


@VISBACKENDS.register_module()
class WandbLog(WandbVisBackend):
    """mmengine's backend, without the upload of every Python file below the current folder."""

    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Records the settings of a run."""
        self.experiment.config.update(config.to_dict(), allow_val_change=True)

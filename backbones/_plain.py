"""Isotropic backbones: one stride, one width; features after every block."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import nn

from terrazzo.backbones._backbone import Backbone


class Plain(Backbone):
    """A backbone whose units are blocks of one width on one grid."""

    units_name = "blocks"

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], channels: int, reduction: int, **kwargs):
        """Args: see `Backbone`; `reduction` is the stride of the stem."""
        super().__init__(stem, blocks, [channels] * len(blocks), [reduction] * len(blocks), **kwargs)

    def run_unit(self, unit: nn.Module, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return checkpoint(unit, x, state) if self.grad_checkpointing else unit(x, state)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from stem to head, for layer-wise learning rate decay."""
        return dict(stem=r"^stem", blocks=[(r"^blocks\.(\d+)", None), (r"^norm\d*", (99999,))])

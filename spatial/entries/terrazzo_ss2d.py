"""The cross-scan of VMamba and MedMamba."""

import torch
from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._scans import scans_along_rows

ROWS, COLUMNS = [0, 2], [1, 3]
"""The numbers of the scans along rows and along columns, each first forward and then reversed."""


def _scan(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The scans' inputs are computed from single pixels. So pixels are exchanged, and the inputs are not."""
    level = part.level(x, 1)
    y = scans_along_rows(part, lambda: module.scan_inputs(x), ROWS, [False, True])
    turned = part.to_columns(x, level)
    columns = scans_along_rows(part, lambda: module.scan_inputs(turned), COLUMNS, [False, True])
    return y + part.to_rows(columns, level)


ENTRIES = {"SS2D": Entry(_scan, method="scan")}

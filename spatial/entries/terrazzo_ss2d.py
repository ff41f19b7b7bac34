"""The cross-scan of VMamba and MedMamba."""

import torch
from torch import nn

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._part import Part
from terrazzo.spatial._scans import selective_scan_2d


def scan(part: Part, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return selective_scan_2d(part, lambda: module.scan_inputs(x), delta_softplus=True)


ENTRIES = {"SS2D": Entry(scan, method="scan")}

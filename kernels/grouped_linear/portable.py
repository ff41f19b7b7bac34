"""Grouped linear layers in standard operations: one product for each group that has rows. The host reads the offsets.

`forward` and `backward` run inside the op, on real tensors.
"""

import itertools
from collections.abc import Iterator

import torch

from terrazzo.kernels.dispatch.dtypes import without_autocast


def _groups(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and their rows."""
    for group, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin < end:
            yield group, slice(begin, end)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """Grouped linear layers; arguments and result as in `reference.grouped_linear`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    with without_autocast(x):
        for group, rows in _groups(offsets):
            if bias is None:
                torch.mm(x[rows], weight[group].t(), out=out[rows])
            else:
                torch.addmm(bias[group], x[rows], weight[group].t(), out=out[rows])
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to x, weight and bias (whether or not there is one)."""
    grad_x = x.new_empty(x.shape)
    grad_weight, grad_bias = weight.new_zeros(weight.shape), weight.new_zeros(weight.shape[:2])
    with without_autocast(x):
        for group, rows in _groups(offsets):
            torch.mm(grad[rows], weight[group], out=grad_x[rows])
            torch.mm(grad[rows].t(), x[rows], out=grad_weight[group])
            torch.sum(grad[rows], 0, out=grad_bias[group])
    return grad_x, grad_weight, grad_bias

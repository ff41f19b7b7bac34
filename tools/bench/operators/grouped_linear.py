"""Grouped linear layers, and plain PyTorch: all rows through all groups, and a loop over groups."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrazzo.kernels import grouped_linear
from terrazzo.tools.bench.operators.operator import Operator


def inputs(sizes: tuple[int, ...], device: torch.device) -> Sequence[torch.Tensor]:
    """Rows, weights, biases and offsets: groups of different sizes, the first of them empty."""
    batch, rows, groups, channels_in, channels_out = sizes
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, batch * rows + 1, (groups - 2,), generator=generator).sort().values
    offsets = torch.cat([torch.zeros(2, dtype=torch.int64), ends, torch.tensor([batch * rows])]).int()
    shapes = ((batch * rows, channels_in), (groups, channels_out, channels_in), (groups, channels_out))
    return [*(torch.randn(shape, device=device) for shape in shapes), offsets.to(device)]


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """All rows through all groups, then the product of each row with its group's mask."""
    row = torch.arange(len(x), device=x.device)
    inside = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
    return (torch.baddbmm(bias.unsqueeze(1), x.expand(len(weight), -1, -1), weight.mT) * inside.unsqueeze(-1)).sum(0)


def loop(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The code of a user without the operator: one group after another."""
    parts = x.split(offsets.diff().tolist())
    return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, weight, bias)])


def library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """PyTorch's grouped product, which has no bias and no float64."""
    if x.dtype == torch.float64:
        return loop(x, weight, bias, offsets)
    group = torch.repeat_interleave(torch.arange(len(weight), device=x.device), offsets.diff(), output_size=len(x))
    return F.grouped_mm(x, weight.mT, offs=offsets[1:]) + bias[group]


GROUPED_LINEAR = Operator(
    name="grouped_linear",
    run=grouped_linear,
    peers={"loop": loop, "dense": dense},
    gpu_peers={"grouped_mm": library},
    compiled={"dense": lambda: torch.compile(dense, dynamic=False)},
    variant="sorted rows",
    axes="B x rows x groups x in x out",
    arguments=("x", "weight", "bias"),
    inputs=inputs,
    # Two experts for each token of M3ViT-tiny at 224 and at 128 x 256, four of M3ViT-small at 224 and at 480 x 640.
    at_224=((394, 16, 192, 384), (258, 16, 192, 384), (788, 16, 384, 384)),
    larger=((4804, 16, 384, 384),),
)

"""Compares a module on one image with the same module on an image that virtual ranks share: values and gradients."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from terrazzo.spatial import LocalGroup, Part
from terrazzo.spatial._parallelize import replace

SIZES = [(12, 9, 2, 2), (26, 11, 3, 4), (13, 7, 5, 2), (19, 8, 4, 4)]
"""Rows, columns, ranks and stride: even and uneven rows, shards thinner than halos, ragged ends, odd widths."""

TOLERANCE = 1e-10


def on_ranks(run: Callable[..., torch.Tensor], x: torch.Tensor, ranks: int, stride: int, dim: int = 2, rows: int = 2):
    """The whole result of `run(part, local rows)` on virtual ranks; a result without rows is taken once.

    Args:
        dim: The dimension of the result's rows; 0 if all ranks have the whole result.
        rows: The dimension of the input's rows; the columns follow.
    """

    def of_rank(group):
        with Part(group, x.shape[rows], x.shape[rows + 1], stride).entered() as part:
            start, end = part.image.rows[part.rank]
            return run(part, x.narrow(rows, start, end - start))

    outs = LocalGroup(ranks).run(of_rank)
    if dim:
        return torch.cat(outs, dim)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=TOLERANCE)
    return sum(outs) / ranks  # gradients: each rank has its share of the loss


def assert_same(found: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    error = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item() if found.numel() else 0.0
    assert error <= tolerance, f"{what} differ by {error:.1e}"


def check_module(
    module: nn.Module, size: tuple[int, int, int, int], channels: int = 4, dim: int = 2, rows: int = 2, **options: Any
) -> nn.Module:
    """Compare a module with its parallelized copy in float64; returns the copy."""
    height, width, ranks, stride = size
    module = module.double()
    shared = copy.deepcopy(module)
    replace(shared, False, options.get("entries"))
    generator = torch.Generator().manual_seed(height * width)
    shape = (2, channels, height, width) if rows == 2 else (2, height, width, channels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameters = list(module.parameters())
    pairs = dict(zip(parameters, shared.parameters()))

    def local(part: Part, x: torch.Tensor) -> torch.Tensor:
        return shared(x)

    results = []
    for run, own in (
        (module, parameters),
        (lambda x: on_ranks(local, x, ranks, stride, dim, rows), list(pairs.values())),
    ):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weight + y.square() * 0.1).sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in own)))
    names = ["results", "gradients of the input", *(f"gradients of {name}" for name, _ in module.named_parameters())]
    for name, wanted, found in zip(names, *results):
        assert_same(found, wanted, name)
    return shared

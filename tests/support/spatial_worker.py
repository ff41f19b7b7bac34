"""One of several processes that share images: compares modules and models with this process alone, in float64.

Usage: spatial_worker.py RANK RANKS STORE
"""

import copy
import datetime
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import terrazzo
from terrazzo import spatial
from terrazzo.errors import InputError
from terrazzo.spatial import _attention, _scans

TOLERANCE = 1e-10
DINAT = dict(embed_dim=8, num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1), dilations=[[4], [2], [1], [1]])
VMAMBA = dict(embed_dim=8, depths=(1, 1, 1, 1), states=2)
MAMBAVISION = dict(dim=8, stem_dim=4, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(5, 3))


def check(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()
    assert error <= TOLERANCE, f"{what} differ by {error:.1e}"


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=4, dilation=4),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 6, 7, padding=3, groups=6),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.ConvTranspose2d(6, 6, 2, stride=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )


def loss_of(maps, count: int) -> torch.Tensor:
    """This rank's share of the loss."""
    maps = [maps] if isinstance(maps, torch.Tensor) else maps
    return sum((y.square() - y).sum() for y in maps) / count


def check_training(name: str, model: nn.Module, height: int, width: int, stride: int, synchronised=False) -> None:
    """Three steps on an image that all processes share equal three steps of one process.

    Args:
        synchronised: whether the processes have SyncBatchNorm in place of BatchNorm2d.
    """
    model = model.double()
    shared = copy.deepcopy(model)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(shared) if synchronised else shared
    shared = spatial.parallelize(shared, stride=stride)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
        wanted = model(x)
        loss = loss_of(wanted, 1000)
        loss.backward()
        found = shared(spatial.scatter(x, stride=stride))
        own = loss_of(found, 1000)
        own.backward()
        spatial.sum_gradients(shared)
        both = own.detach().clone()
        dist.all_reduce(both)
        check(both, loss.detach(), f"{name}: losses of step {step}")
        for y, z in zip(*(([maps] if isinstance(maps, torch.Tensor) else maps) for maps in (found, wanted))):
            check(spatial.gather(y.detach()), z.detach(), f"{name}: outputs of step {step}")
        for (key, a), b in zip(model.named_parameters(), shared.parameters()):
            check(b.grad, a.grad, f"{name}: gradients of {key} in step {step}")
            with torch.no_grad():
                for parameter in (a, b):
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    for (key, a), b in zip(model.state_dict().items(), shared.state_dict().values()):
        check(b.double(), a.double(), f"{name}: {key} at the end")


def check_sequences(group: spatial.Group) -> None:
    """Attention in a ring with its fast backward pass, linear attention, and the state space dual."""
    part = spatial.Part(group, 32 * group.size, 32)
    counts = [5, 3, 6][: group.size]
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 3, sum(counts), 4, generator=generator, dtype=torch.float64)
    dt = torch.rand(2, sum(counts), 3, generator=generator, dtype=torch.float64)
    decays = -torch.ones(3, dtype=torch.float64)

    def tokens(x):
        return x.transpose(1, 2)

    def linear(query, key, value):
        weights = query.exp() @ key.exp().transpose(2, 3)
        return weights @ value / weights.sum(3, keepdim=True)

    def own(x, dim):
        return x.split(counts, dim)[group.rank]

    scan = terrazzo.kernels.ssd
    for name, whole, local in (
        ("ring", F.scaled_dot_product_attention, lambda *x: _attention.attention(part, *x, counts, None)),
        ("linear", linear, lambda q, k, v: _attention.linear_attention(part, q.exp(), k.exp(), v)),
        (
            "ssd",
            lambda *x: tokens(scan(tokens(x[2]), dt, decays, tokens(x[1]), tokens(x[0]))),
            lambda *x: tokens(_scans.ssd(part, tokens(x[2]), own(dt, 1), decays, tokens(x[1]), tokens(x[0]))),
        ),
    ):
        given = [x.clone().requires_grad_() for x in (query, key, value)]
        wanted = whole(*given)
        loss_of(wanted, 1).backward()
        leaves = [own(x, 2).clone().requires_grad_() for x in (query, key, value)]
        found = local(*leaves)
        loss_of(found, 1).backward()
        check(found.detach(), own(wanted.detach(), 2), name)
        for a, b in zip(leaves, given):
            check(a.grad, own(b.grad, 2), f"gradients of {name}")


def main(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    _attention.FEW = 0
    torch.manual_seed(0)
    check_sequences(spatial.Processes())
    check_training("stack", stack(), 28, 11, 4)
    check_training("synchronised stack", stack(), 28, 11, 4, synchronised=True)
    for name, options in (("dinat_mini", DINAT), ("vmamba_tiny_s1l8", VMAMBA), ("mambavision_t", MAMBAVISION)):
        model = timm.create_model(name, features_only=True, **options)
        check_training(name, model, 32 * ranks + 22, 75, 32)
    with pytest.raises(InputError, match="cut it with"):
        spatial.parallelize(nn.Conv2d(3, 3, 3, padding=1))(torch.zeros(1, 3, 40 - rank, 64))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

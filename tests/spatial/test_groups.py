"""Cuts, virtual ranks and their threads, and the wrapped collectives of PyTorch."""

import pytest
import torch
import torch.distributed as dist

from terrazzo import spatial
from terrazzo.errors import InputError
from terrazzo.spatial import LocalGroup, Part, _collectives


@pytest.mark.parametrize(
    ("height", "ranks", "stride", "cuts"),
    [
        (128, 2, 32, ((0, 64), (64, 128))),
        (160, 3, 32, ((0, 64), (64, 128), (128, 160))),  # larger shares first
        (150, 2, 32, ((0, 64), (64, 150))),  # the rest belongs to the last rank
        (5, 1, 32, ((0, 5),)),
    ],
)
def test_rows(height, ranks, stride, cuts):
    assert spatial.rows(height, ranks, stride) == cuts


def test_too_few_rows_are_refused():
    with pytest.raises(InputError, match="70 rows make 2 units of stride 32, too few for 3 ranks"):
        spatial.rows(70, 3)
    with pytest.raises(InputError, match="at least 1"):
        spatial.rows(70, 0)


def test_one_rank_runs_at_a_time_until_it_needs_the_others():
    order = []

    def run(group):
        for step in range(2):
            order.append((step, group.rank))
            assert group.objects(group.rank) == [0, 1, 2]
        return group.rank

    assert LocalGroup(3).run(run) == [0, 1, 2]
    assert sorted(order[:3]) == [(0, 0), (0, 1), (0, 2)]
    assert sorted(order[3:]) == [(1, 0), (1, 1), (1, 2)]


def test_an_error_of_a_rank_ends_all_ranks():
    def run(group):
        if group.rank == 1:
            raise KeyError("rank 1")
        return group.objects(0)

    with pytest.raises(KeyError, match="rank 1"):
        LocalGroup(3).run(run)


def test_ranks_that_take_different_ways_are_found():
    with pytest.raises(RuntimeError, match="different ways"):
        LocalGroup(2).run(lambda group: group.objects(0) if group.rank else None)


def test_threads_have_the_settings_of_their_caller():
    def run(group):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    assert LocalGroup(2).run(run) == [(True, False, False)] * 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert LocalGroup(2).run(run) == [(False, False, True)] * 2
    with torch.inference_mode():
        assert LocalGroup(2).run(run) == [(False, True, False)] * 2


def test_the_collectives_of_the_installed_version(tmp_path):
    """Their gradients, with a single process; several processes are in test_processes.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.arange(6.0, requires_grad=True)
        (_collectives.swap(x, [6], [6], dist.group.WORLD) * torch.arange(6.0)).sum().backward()
        assert torch.equal(x.grad, torch.arange(6.0))
        x = torch.arange(6.0, requires_grad=True)
        _collectives.total(x * 2, dist.group.WORLD).sum().backward()
        assert torch.equal(x.grad, torch.full((6,), 2.0))
        model = spatial.parallelize(torch.nn.Conv2d(3, 2, 3, padding=1))
        image = torch.randn(1, 3, 40, 8)
        found = spatial.gather(model(spatial.scatter(image)))
        assert torch.allclose(found, spatial.restore(model)(image), atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_processes_need_a_process_group():
    with pytest.raises(InputError, match="torchrun"):
        spatial.parallelize(torch.nn.Identity())
    with pytest.raises(InputError, match="axis must be 'rows'"):
        spatial.parallelize(torch.nn.Identity(), axis="columns")


@pytest.mark.parametrize("shift", [-3, -1, 2, 4])
def test_rolled_rows(shift):
    x = torch.arange(14.0).view(1, 1, 7, 2)

    def run(group):
        part = Part(group, 7, 2, 2)
        return part.rolled(part.scatter(x), 2, part.image, shift)

    assert torch.equal(torch.cat(LocalGroup(3).run(run), 2), x.roll(shift, 2))


def test_a_mistake_of_shape_names_the_map():
    with pytest.raises(InputError, match="the image must be 64x8, got 64x9"):
        LocalGroup(2).run(lambda group: Part(group, 64, 8).scatter(torch.zeros(1, 3, 64, 9)))

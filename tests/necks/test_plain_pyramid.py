"""A pyramid from the single map of a plain backbone."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from terrazzo.necks import PlainPyramid


@pytest.fixture
def neck():
    torch.manual_seed(0)
    return PlainPyramid([8])


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_levels_by_their_definition(neck, size):
    x = torch.randn(2, 8, *size)
    first, norm, _, second = neck.fpn1
    with torch.no_grad():
        found = neck([x])
        y = F.layer_norm(first(x).permute(0, 2, 3, 1), (8,), norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(found[0], second(F.gelu(y)))
        torch.testing.assert_close(found[1], neck.fpn2(x))
        assert torch.equal(found[2], x)
        padded = F.pad(x, (0, size[1] % 2, 0, size[0] % 2), value=float("-inf"))
        assert torch.equal(found[3], F.max_pool2d(padded, 2))
    sides = [4, 2, 1, 0.5]
    assert [tuple(y.shape[2:]) for y in found] == [tuple(-int(-side * s // 1) for side in size) for s in sides]


def test_another_neck_behind():
    import terrazzo.openmmlab  # noqa: F401  before mmseg, which wants mmcv's operators

    pytest.importorskip("mmseg.models")
    neck = PlainPyramid([8], neck=dict(type="mmseg.FPN", out_channels=16, num_outs=4))
    found = neck([torch.randn(1, 8, 6, 4)])
    assert [tuple(y.shape) for y in found] == [(1, 16, 24, 16), (1, 16, 12, 8), (1, 16, 6, 4), (1, 16, 3, 2)]
    sum(y.square().sum() for y in found).backward()
    assert all(p.grad is not None for p in neck.parameters())

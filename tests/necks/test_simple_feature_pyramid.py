"""ViTDet's neck makes all levels from one map."""

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from mmengine.registry import MODELS

import terrazzo.openmmlab  # noqa: F401  registers the necks
from terrazzo.errors import InputError

NECK = dict(type="SimpleFeaturePyramid", in_channels=32, out_channels=16)


def build(**options):
    torch.manual_seed(0)
    return MODELS.build({**NECK, **options})


@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 5)])
def test_levels(height, width):
    """A map of stride 16 gives strides 4 to 64; halves are rounded up."""
    found = build()([torch.randn(2, 32, height, width)])
    sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
    sizes += [(-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
    assert [tuple(x.shape) for x in found] == [(2, 16, *size) for size in sizes]


def test_parameters_are_vitdets():
    """Levels have two, one or no transposed convolution, then a 1x1 and a 3x3 without bias; all have norms."""
    neck, c, o = build(), 32, 16
    tails = [(inside, inside * o + o * 2 + o * o * 9 + o * 2) for inside in (c // 4, c // 2, c, c)]
    wanted = sum(tail for _, tail in tails)
    wanted += (c * (c // 2) * 4 + c // 2) + c // 2 * 2 + ((c // 2) * (c // 4) * 4 + c // 4)
    wanted += c * (c // 2) * 4 + c // 2
    assert sum(p.numel() for p in neck.parameters()) == wanted


def test_the_last_map_is_taken():
    neck = build(in_channels=[8, 8, 32])
    maps = [torch.randn(1, c, 8, 8) for c in (8, 8, 32)]
    for found, wanted in zip(neck(maps), neck(maps[-1:])):
        assert torch.equal(found, wanted)


def test_a_level_is_local():
    """At every scale, a position of the map affects only its place and the reach of a 3x3 convolution."""
    neck = build().eval()
    x = torch.randn(1, 32, 16, 16)
    y = x.clone()
    y[..., 6, 10] += 1
    with torch.no_grad():
        for scale, before, after in zip((4, 2, 1, 0.5), neck([x]), neck([y])):
            rows, columns = (before - after)[0].abs().sum(0).nonzero().unbind(1)
            for places, at in ((rows, 6), (columns, 10)):
                assert places.min() == at * scale - 1
                assert places.max() == int((at + 1) * scale + 0.5) - 1 + 1


def test_every_parameter_learns():
    neck = build()
    sum(x.square().sum() for x in neck([torch.randn(1, 32, 8, 8)])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scales": (4, 3)}, "among 4, 2, 1 and 0.5"), ({"num_outs": 3}, "at least the 4 scales, got 3")],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)

"""The neck that adds a level of stride 4 to a pyramid that begins at stride 8."""

import pytest
import torch

pytest.importorskip("mmengine", reason="needs the extra 'openmmlab'")

from mmengine.registry import MODELS, DefaultScope

from terrazzo.openmmlab.config import load_config


@pytest.fixture
def neck():
    """The neck of the packaged Mask R-CNN."""
    import terrazzo.openmmlab  # noqa: F401  before mmdet, which wants mmcv's operators

    with DefaultScope.overwrite_default_scope("mmdet"):
        found = MODELS.build(load_config("mask-rcnn_dualtokenvit-small-mix_fpn_1x_coco").model.neck)
    found.init_weights()
    return found


def test_levels(neck):
    maps = [torch.randn(2, c, side, side + 2) for c, side in ((64, 16), (128, 8), (256, 4))]
    found = neck(maps)
    assert [tuple(x.shape) for x in found] == [(2, 256, s, w) for s, w in ((32, 36), (16, 18), (8, 10), (4, 6), (2, 3))]


def test_the_finer_level_is_the_finest_map_upsampled(neck):
    """Each position comes from the coarser position that contains it; the inner neck makes the other levels."""
    maps = [torch.zeros(1, c, side, side) for c, side in ((64, 8), (128, 4), (256, 2))]
    maps[0][:, :, 3, 5] = 1
    with torch.no_grad():
        finer = neck.finer(maps[0]) - neck.finer(torch.zeros_like(maps[0]))
    assert finer[0].abs().sum(0).nonzero().tolist() == [[6, 10], [6, 11], [7, 10], [7, 11]]
    for found, wanted in zip(neck(maps), neck.neck((neck.finer(maps[0]), *maps))):
        assert torch.equal(found, wanted)


def test_every_parameter_learns(neck):
    maps = [torch.randn(1, c, side, side) for c, side in ((64, 8), (128, 4), (256, 2))]
    sum(x.square().sum() for x in neck(maps)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())

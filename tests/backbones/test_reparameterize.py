"""`terrazzo.reparameterize` on models of timm."""

import pytest
import torch
from support.seeded import build, image
from torch import nn

import terrazzo


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "repghostnet_050", "fastvit_t8", "levit_conv_128s"]
)
def test_timm(name):
    model, x = build(name), image((224, 224))
    wanted, before = model(x), sum(1 for _ in model.modules())
    assert terrazzo.reparameterize(model) is model
    assert sum(1 for _ in model.modules()) < before
    assert (model(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_features_only():
    model = build("repvgg_a0", features_only=True)
    x = image((64, 64))
    wanted = model(x)
    terrazzo.reparameterize(model)
    for found, map_ in zip(model(x), wanted):
        torch.testing.assert_close(found, map_, rtol=1e-4, atol=1e-4 * map_.abs().max().item())


@torch.no_grad()
def test_other_models_stay():
    """A layer that has the name of a method is a layer."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    model[0].fuse = nn.Identity()
    model[1].reparameterize = True
    names = list(model.state_dict())
    assert terrazzo.reparameterize(model) is model
    assert list(model.state_dict()) == names

"""Learned numbers have one dimension; older or official checkpoints, in which they have none, also load."""

import pytest
import timm
import torch
from support.seeded import build

from terrazzo.backbones import asvit, dualtokenvit

MODELS = {
    "dualtokenvit_tiny_mix": (dualtokenvit, dict(depths=(1, 1, 1))),
    "asvit_deit_tiny": (asvit, dict(depth=3, blocks=(1, 2), embed_dim=48)),
}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_without_the_dimension(name, tmp_path):
    """They load by `load_state_dict`, by the family's filter and by timm."""
    module, options = MODELS[name]
    wanted = build(name, **options).state_dict()
    numbers = [key for key in wanted if key.endswith(".alpha") or ".thresholds." in key]
    assert numbers, "the test would prove nothing"
    old = {key: value.reshape(()) if key in numbers else value for key, value in wanted.items()}
    torch.save(old, tmp_path / "old.pth")
    fresh, model = timm.create_model(name, **options), timm.create_model(name, **options)
    fresh.load_state_dict(old, strict=True)
    model.load_state_dict(module.checkpoint_filter_fn(dict(old), model), strict=True)
    timms = timm.create_model(name, checkpoint_path=tmp_path / "old.pth", **options)
    for found in (fresh, model, timms):
        assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())

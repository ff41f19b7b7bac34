"""Every packaged config builds, takes a training step and validates, on tiny data."""

import math

import pytest
import torch

from terrazzo.openmmlab.config import build_runner, packaged_configs


@pytest.mark.parametrize("name", list(packaged_configs()))
def test_trains_and_validates(name, tiny_config, tmp_path):
    runner = build_runner(tiny_config(name), tmp_path, seed=0)
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    after = dict(runner.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    backbone = [key for key in before if key.startswith("backbone.")]
    assert any(not torch.equal(before[key], after[key]) for key in backbone)
    assert any(key.startswith("val/") for key in runner.message_hub.log_scalars)
    assert list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("name", list(packaged_configs()))
def test_file_names_and_docstrings(name):
    path = packaged_configs()[name]
    text = path.read_text()
    assert text.startswith('"""')
    assert 'custom_imports = dict(imports=["terrazzo.openmmlab"])' in text
    assert len(text.splitlines()) <= 40

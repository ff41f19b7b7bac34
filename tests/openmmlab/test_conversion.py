"""Conversion: what stages compare and train, teacher forcing, memory, and checkpoints that rebuild."""

import copy

import pytest
import timm
import torch

from terrazzo.openmmlab import AttentionConversion
from terrazzo.openmmlab.conversion.forcing import forced

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a small teacher's weights, with attention that is not flat."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SMALL)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
            block.attn.proj.weight.mul_(12)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(model.state_dict(), file)
    return str(file)


@pytest.fixture
def make(weights):
    def made(stage="hidden", mixer="hedgehog", layers="all", init="attention", **more):
        torch.manual_seed(1)
        teacher = dict(name=NAME, checkpoint=weights, **{**SMALL, **more})
        return AttentionConversion(teacher, dict(mixer=mixer, layers=layers), stage, init).train()

    return made


def batch(count=4, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def losses_of(model, images=None, targets=None):
    return model(batch() if images is None else images, targets, mode="loss")


def test_forcing_gives_what_the_teacher_has(make):
    model = make()
    teacher, x = model.teacher, batch()
    tokens = {}
    for layer, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda m, i, o, layer=layer: tokens.update({layer: o}))
    with torch.no_grad():
        teacher.forward_features(x)
    for given in forced(teacher, x, (0, 2), matrices=True):
        block = teacher.blocks[given.layer]
        torch.testing.assert_close(given.left, tokens[given.layer])
        torch.testing.assert_close(given.given, block.norm1(given.tokens))
        torch.testing.assert_close(given.attended, block.attn(given.given))
        value = block.attn.in_heads(block.attn.values(given.given))
        out = (given.matrix @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(out), given.attended)
    assert model.teacher.blocks[2].attn.mixer is None


@pytest.mark.parametrize("stage", ["matrix", "hidden", dict(type="hidden", target="block")])
def test_a_layerwise_stage_learns(make, stage):
    model = make(stage)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    seen = []
    for _ in range(20):
        losses = losses_of(model)
        seen.append(losses["loss"].item())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert seen[-1] < 0.8 * seen[0]
    assert set(losses) == {"loss", *(f"{kind}{i}" for kind in ("error", "front") for i in range(3))}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".attn." in name for name in changed)
    assert any("query_map" in name for name in changed)
    assert any(".attn.proj." in name for name in changed) == (stage != "matrix")

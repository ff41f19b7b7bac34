"""Adapters in the stage "distil": what trains, names in checkpoints, and the student with plain weights."""

import copy

import pytest
import torch
from support.teachers import teacher_file

from terrazzo.backbones._hosts import record_of
from terrazzo.errors import InputError
from terrazzo.openmmlab import AttentionConversion

pytest.importorskip("peft", reason="needs the extra 'conversion'")

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return teacher_file(tmp_path_factory.mktemp("teacher"), NAME, **SMALL)


@pytest.fixture
def make(weights):
    def made(layers=(1,), **options):
        torch.manual_seed(1)
        teacher = dict(name=NAME, checkpoint=weights, **SMALL)
        stage = dict(type="distil", **(options or dict(trained="adapters", rank=4, alpha=8)))
        return AttentionConversion(teacher, dict(mixer="hedgehog", layers=layers), stage).train()

    return made


def batch():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def step(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):  # at first only one of an adapter's two matrices has a gradient
        terms = model(batch(), mode="loss")
        optimizer.zero_grad()
        sum(value for name, value in terms.items() if "loss" in name).backward()
        optimizer.step()


def test_converted_attention_trains_in_full_and_the_rest_by_adapters(make):
    model = make()
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    attention = {f"blocks.1.attn.{name}" for name, _ in model.backbone.blocks[1].attn.named_parameters()}
    adapted = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    adapted = [name for name in adapted if not name.startswith("blocks.1.attn")]
    assert trained == attention | {f"{name}.lora_{side}.default.weight" for name in adapted for side in "AB"}
    assert model.backbone.blocks[0].attn.qkv.lora_A["default"].weight.shape == (4, 32)
    x = batch()
    with torch.no_grad():  # they change nothing at first
        torch.testing.assert_close(model.backbone(x), make(trained="attention").backbone(x))
    before = copy.deepcopy(model.state_dict())
    step(model)
    changed = {
        name.removeprefix("backbone.") for name, v in model.state_dict().items() if not torch.equal(v, before[name])
    }
    assert changed <= trained
    assert {name for name in changed if "lora_" in name} == {name for name in trained if "lora_" in name}


def test_the_student_has_the_vits_own_names_and_the_same_outputs(make):
    model, plain = make(), make(trained="all")
    step(model)
    student = model.stage.finished(model)
    assert list(student.state_dict()) == list(plain.backbone.state_dict())
    assert record_of(student) == record_of(plain)
    assert not any("lora" in name or "peft" in name for name in (*vars(student), *dict(student.named_modules())))
    x = batch()
    with torch.no_grad():
        torch.testing.assert_close(student(x), model.backbone(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.backbone(x), plain.backbone(x), rtol=1e-3, atol=1e-3)
    assert model.stage.finished(plain) is not None
    assert plain.stage.finished(plain) is None


def test_weights_with_plain_names_and_with_adapters_load(make):
    """`load_from` brings the names of a stage without adapters; a resumed run brings adapters."""
    plain, model = make(trained="all"), make()
    with torch.no_grad():
        for parameter in plain.backbone.parameters():
            parameter.add_(0.01)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert all("lora_" in name for name in missing.missing_keys)
    x = batch()
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x), plain.backbone(x))
    step(model)
    again = make()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.backbone(x), model.backbone(x))
        assert torch.equal(copy.deepcopy(model).backbone(x), model.backbone(x))


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=1.5), dict(alpha=0.0)])
def test_bad_options(make, options):
    with pytest.raises(InputError, match="rank must be a whole number of 1 or more, and alpha above 0"):
        make(trained="adapters", **options)


def test_without_peft(make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"needs the package peft, .*\[conversion\]"):
        make(trained="adapters")

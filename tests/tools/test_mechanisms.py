"""What --mixer and --reduce mean, and models that share weights."""

import copy

import pytest
import timm
import torch

from terrazzo.backbones._hosts import record_of
from terrazzo.backbones._shared import shared_copy
from terrazzo.backbones.mixers import mixers
from terrazzo.backbones.reducers import reducers
from terrazzo.checkpoints.records import meta_of
from terrazzo.errors import InputError
from terrazzo.tools.mechanisms import chosen, of_mixer, on_meta, without_parameters


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_vit").eval()


def test_texts():
    found = chosen(
        ["llsa,level=1,layers=(0,1)", "hedgehog"], [], ["mctf,r=0.35,restore=copy", "mctf,r=0.35,restore=copy"]
    )
    assert [mechanism.name for mechanism in found] == [
        "llsa,level=1,layers=(0,1)",
        "hedgehog",
        "mctf,r=0.35,restore=copy",
    ]
    assert [mechanism.name for mechanism in chosen(["llsa,topk=2"], ["topk=1", "edge=2"], [])] == ["llsa,topk=2,edge=2"]
    with pytest.raises(InputError, match="KEY=VALUE, got 'method=asvit'"):
        chosen([], [], ["mctf,method=asvit"])


def test_a_changed_model_shares_the_weights_and_leaves_the_model(model):
    (mechanism,) = chosen(["llsa,layers=(0,1)"], [], [])
    changed = mechanism.on(model)
    assert changed.conversion.keys() == {0, 1}
    assert not hasattr(model, "conversion")
    assert all(a is b for a, b in zip(changed.parameters(), model.parameters()))
    assert shared_copy(model).cls_token is model.cls_token


@pytest.mark.parametrize("method", reducers())
def test_every_reducer(model, method):
    """`--reduce NAME` takes every method, with the defaults of `terrazzo.reduce`."""
    (mechanism,) = chosen([], [], [method])
    assert mechanism.on(model).changes["reduce"]["method"] == method


@pytest.mark.long
def test_trained_weights_of_a_mixer(model, tmp_path):
    """`checkpoint` names weights of the model with the mixer; they change no other model."""
    (untrained,) = chosen(["hedgehog"], [], [])
    trained = copy.deepcopy(untrained.on(model))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    torch.save({"state_dict": trained.state_dict(), "meta": meta_of(record_of(trained))}, tmp_path / "student.pth")
    before = model.cls_token.clone()
    (mechanism,) = chosen([f"hedgehog,checkpoint={tmp_path / 'student.pth'}"], [], [])
    found = mechanism.on(model)
    torch.testing.assert_close(found.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert torch.equal(model.cls_token, before)
    (other,) = chosen([f"hedgehog,layers=(0,),checkpoint={tmp_path / 'student.pth'}"], [], [])
    with pytest.raises(InputError, match=r"other mixers .*pass --mixer hedgehog"):
        other.on(model)


def test_a_copy_without_numbers(model):
    images = torch.empty(1, 3, 160, 160, device="meta")
    assert on_meta(model)(images).shape == (1, 1000)
    assert not next(model.parameters()).is_meta


def test_mixers_without_parameters(model):
    found = without_parameters(model)
    assert {"llsa"} <= set(found) <= set(mixers()) - {"softmax", "hedgehog"}
    assert of_mixer("llsa").on(model).conversion


def test_added_parameters_do_not_depend_on_what_was_made_before():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=64)
    (soft,) = chosen(["soft"], [], [])
    once, state = soft.on(model), torch.get_rng_state()
    torch.rand(7)
    again = soft.on(model)
    added = dict(once.named_parameters()).keys() - dict(model.named_parameters()).keys()
    assert added
    assert all(torch.equal(once.get_parameter(name), again.get_parameter(name)) for name in added)
    torch.set_rng_state(state)
    drawn = torch.rand(3)
    torch.set_rng_state(state)
    soft.on(model)
    assert torch.equal(torch.rand(3), drawn)  # the caller's random numbers go on as before

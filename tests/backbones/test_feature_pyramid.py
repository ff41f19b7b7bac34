"""`pyramid=True`, `terrazzo.feature_pyramid` and `terrazzo.register_pyramid`: four strides from a plain backbone."""

import math

import pytest
import timm
import torch
from support.seeded import build, image

import terrazzo
from terrazzo.backbones import _feature_pyramid
from terrazzo.errors import InputError

PLAIN = {
    "asvit_deit_tiny": dict(embed_dim=48, depth=4, num_heads=3),
    "dinat_isotropic_small": dict(embed_dim=64, num_heads=2, dilations=(1, 2)),
    "infvit_linear_4l_patch16_224": dict(embed_dim=64, num_heads=2, depth=1),
    "m3vit_tiny": dict(depth=2),
    "mctf_deit_tiny": dict(),
    "mixer_vit_tiny": dict(depth=2),
    "roma_tiny": dict(embed_dim=64, depth=3),
    "vir_small_patch16_224": dict(embed_dim=48, depth=2, num_heads=4),
}


def sizes(model, height, width):
    info = model.feature_info
    return [(1, c, math.ceil(height / r), math.ceil(width / r)) for c, r in zip(info.channels(), info.reduction())]


@pytest.mark.parametrize("name", PLAIN)
def test_maps(name):
    model = build(name, features_only=True, pyramid=True, pyramid_channels=32, **PLAIN[name])
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [32] * 4
    for size in ((97, 70), (32, 32)):
        maps = model(image(size))
        assert [tuple(found.shape) for found in maps] == sizes(model, *size)
        assert all(found.isfinite().all() for found in maps)


def test_every_parameter_learns_also_with_checkpointing_and_a_frozen_backbone():
    model = build("mixer_vit_tiny", features_only=True, pyramid=True, norm_outputs=True, depth=2).train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        assert model.model.grad_checkpointing == checkpointing
        model.zero_grad()
        sum(found.square().mean() for found in model(image((64, 64)))).backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    model.zero_grad()
    model.model.requires_grad_(False)
    model(image((64, 64)))[0].sum().backward()
    assert model.levels["0"][0].weight.grad is not None
    assert all(p.grad is None for p in model.model.parameters())


def test_levels_are_chosen_and_other_levels_have_no_parameters():
    full = build("mixer_vit_tiny", features_only=True, pyramid=True, depth=2)
    for indices, strides in (((1, 3), [8, 32]), (2, [16, 32]), ((-2,), [16])):
        model = timm.create_model("mixer_vit_tiny", features_only=True, pyramid=True, depth=2, out_indices=indices)
        assert model.feature_info.reduction() == strides
        assert list(model.levels) == [str({4: 0, 8: 1, 16: 2, 32: 3}[stride]) for stride in strides]
        own = full.state_dict()
        model.eval().load_state_dict({key: own[key] for key in model.state_dict()}, strict=True)
        x = image((64, 64))
        for found, i in zip(model(x), model.out_indices):
            assert torch.equal(found, full(x)[i])


def test_patches_of_8_pixels():
    options = dict(embed_dim=64, num_heads=2, depth=1, patch_size=8)
    model = build("infvit_linear_4l_patch16_224", features_only=True, pyramid=True, **options)
    assert [tuple(found.shape) for found in model(image((97, 70)))] == sizes(model, 97, 70)


def test_models_of_timm_and_reduced_models():
    vit = timm.create_model("vit_tiny_patch16_224", depth=4, dynamic_img_size=True, dynamic_img_pad=True).eval()
    last = vit.forward_intermediates(image((64, 96)), indices=1, norm=True, intermediates_only=True)[0]
    model = terrazzo.feature_pyramid(vit, channels=16, out_indices=(1, 2), norm=True).eval()
    maps = model(image((64, 96)))
    assert [tuple(found.shape) for found in maps] == sizes(model, 64, 96)
    torch.testing.assert_close(model.levels["2"](last), maps[1])
    terrazzo.reduce(model, r=2)
    assert model.model.reduction["method"] == "mctf"
    assert [tuple(found.shape) for found in model(image((64, 96)))] == sizes(model, 64, 96)
    assert terrazzo.reduce(model, r=0) is model
    torch.testing.assert_close(model(image((64, 96))), maps)


def test_a_name_of_its_own(monkeypatch):
    """Programs that build by name alone get the pyramid; names of families stay as they are."""
    models = list(terrazzo.backbones._names.registered_models())
    name = terrazzo.register_pyramid("roma_tiny", channels=24, embed_dim=64, depth=3)
    try:
        assert name == "roma_tiny_pyramid"
        model = timm.create_model(name, features_only=True, in_chans=4, out_indices=(0, 1, 2, 3), output_stride=None)
        assert model.feature_info.channels() == [24] * 4
        assert [tuple(found.shape) for found in model(image((64, 64), chans=4))] == sizes(model, 64, 64)
        assert timm.create_model(name, num_classes=5)(image((64, 64))).shape == (1, 5)
        assert list(terrazzo.backbones._names.registered_models()) == models
    finally:
        timm.models._registry._clear_model_entries(name)
        delattr(_feature_pyramid, name)
        _feature_pyramid.__all__.remove(name)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("mixer_vit_tiny", dict(pyramid=True), "pass features_only=True, too"),
        ("mixer_vit_tiny", dict(output_stride=16), "mixer_vit_tiny has one stride: leave it out"),
        ("mixer_vit_tiny", dict(features_only=True, pyramid=True, output_stride=8), "has one stride"),
        (
            "vir_large_patch14_224",
            dict(features_only=True, pyramid=True),
            "and ViR has 14: create",
        ),
    ],
)
def test_refusals(name, options, text):
    with pytest.raises(InputError, match=text):
        timm.create_model(name, device="meta", **options)


def test_no_pyramid_of_a_pyramid():
    with pytest.raises(InputError, match="dinat_mini has several: leave it out"):
        timm.create_model("dinat_mini", features_only=True, pyramid=True, device="meta")
    with pytest.raises(InputError, match=r"one stride, and NAT has \[4, 8, 16, 32\]"):
        terrazzo.feature_pyramid(timm.create_model("dinat_mini", device="meta"))

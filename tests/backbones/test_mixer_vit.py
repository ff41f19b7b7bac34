"""Backbones for any mixer: the contract, and every mixer in both architectures."""

import pytest
import timm
import torch
from support.contract import BackboneContract, build, image

import terrazzo
from terrazzo.errors import InputError

SPARSE = dict(dense_up_to=0, topk=2, edge=2, part=None)  # LLSA that is sparse on small maps, too


class TestMixerViT(BackboneContract):
    """At 224, LLSA computes softmax attention in `mixer_vit_*`, so parameters and multiply-adds are DeiT's."""

    representatives = ("mixer_vit_tiny", "mixer_pyramid_tiny")
    operators_of = "s2aformer"
    untrained = ("mixer_vit_tiny", "mixer_vit_small", "mixer_pyramid_tiny")
    shallow = {
        "mixer_vit_tiny": dict(depth=1, mixer="hedgehog"),
        "mixer_vit_small": dict(depth=1),
        "mixer_pyramid_tiny": dict(depths=(1, 1, 1, 1), mixer_options=(SPARSE, SPARSE, {}, {})),
    }
    costs = {
        "mixer_vit_tiny": (5_717_416, 1.26),
        "mixer_vit_small": (22_050_664, 4.6),
        "mixer_pyramid_tiny": (13_652_872, 3.038),
    }


@pytest.mark.parametrize("mixer", terrazzo.mixers())
def test_every_mixer_trains(mixer):
    """A training step reaches every parameter in both architectures, and then both take images of any size."""
    models = (
        timm.create_model("mixer_vit_tiny", mixer=mixer, embed_dim=32, num_heads=2, depth=1, num_classes=3),
        timm.create_model(
            "mixer_pyramid_tiny", mixers=(mixer, mixer), dim=32, depths=(1, 1), head_dim=16, num_classes=3
        ),
    )
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        model(image((64, 96), batch=2)).square().mean().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimizer.step()
        with torch.no_grad():
            out, maps = model.eval().forward_intermediates(image((97, 70)))
            assert out.isfinite().all()
            assert all(found.isfinite().all() for found in maps)


@torch.no_grad()
def test_is_deit_with_another_mixer():
    """With DeiT's weights and softmax attention it is DeiT; another mixer is `convert_attention`'s."""
    deit = build("deit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    x = image((96, 160))
    for mixer, options in (("softmax", {}), ("llsa", SPARSE)):
        model = timm.create_model("mixer_vit_tiny", depth=2, mixer=mixer, mixer_options=options).eval()
        model.load_state_dict(deit.state_dict())
        terrazzo.convert_attention(deit, mixer, **options)
        torch.testing.assert_close(model(x), deit(x))


def test_mixers_initialise_their_own_parameters():
    """The ViT's initialisation of linear layers, with a standard deviation of 0.02, leaves mixers alone."""
    vit = timm.create_model("mixer_vit_tiny", mixer="dma", embed_dim=64, num_heads=2, depth=1)
    pyramid = timm.create_model("mixer_pyramid_tiny", mixers=("dma",), depths=(1,), head_dim=32)
    for block in (vit.blocks[0], pyramid.stages[0].blocks[0].block):
        assert block.attn.qkv.weight.std() < 0.03
        assert block.attn.mixer.delta.weight.std() > 0.05


def test_each_stage_has_its_mixer():
    options = ({}, None, dict(topk=3), {})
    model = timm.create_model(
        "mixer_pyramid_tiny", mixers=("softmax", "hedgehog", "llsa", "softmax"), mixer_options=options, device="meta"
    )
    found = [[placed.block.attn.mixer for placed in stage.blocks] for stage in model.stages]
    assert [{getattr(mixer, "name", None) for mixer in stage} for stage in found] == [
        {None},
        {"hedgehog"},
        {"llsa"},
        {None},
    ]
    assert [mixer.host.layer for mixer in found[2]] == [4, 5, 6, 7, 8, 9]
    assert {mixer.host.depth for mixer in found[2]} == {12}
    assert {mixer.topk for mixer in found[2]} == {3}


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("mixer_vit_tiny", dict(mixer="tome"), "mixer must be one of .*softmax.*, got 'tome'"),
        ("mixer_vit_tiny", dict(mixer=("llsa", "llsa")), r"mixer must be one of .*, got \('llsa', 'llsa'\)"),
        ("mixer_vit_tiny", dict(mixer_options=dict(tile=3)), "options of 'llsa' are level, .*, got tile"),
        ("mixer_vit_tiny", dict(mixer="softmax", mixer_options=dict(topk=3)), "'softmax' has no options, got topk"),
        ("mixer_vit_tiny", dict(mixer_options=["topk"]), r"must be a dict of names and values, got \['topk'\]"),
        ("mixer_vit_tiny", dict(window=7), "mixer 'llsa' needs tokens on a grid, and the reducer changes the tokens"),
        ("mixer_pyramid_tiny", dict(mixers=("llsa", "llsa")), "mixers must have one entry for each of the 4 stages"),
        ("mixer_pyramid_tiny", dict(mixers="llsa"), "mixers must have one entry for each of the 4 stages, got 'llsa'"),
        ("mixer_pyramid_tiny", dict(mixers=("llsa", "tome", "na", "na")), "mixer must be one of .*, got 'tome'"),
        ("mixer_pyramid_tiny", dict(mixer_options=({},)), "mixer_options must have one entry for each of the 4 stages"),
        ("mixer_pyramid_tiny", dict(mixer_options=dict(topk=3)), "mixer_options must have one entry for each of the 4"),
        ("mixer_pyramid_tiny", dict(dim=48), "dim must be a multiple of head_dim, 32, got 48"),
    ],
)
def test_refusals(name, arguments, error):
    with pytest.raises(InputError, match=error) as found:
        timm.create_model(name, device="meta", **arguments)
    assert "\n" not in str(found.value)


@torch.no_grad()
def test_a_block_alone_does_not_know_where_its_tokens_stand():
    model = timm.create_model("mixer_vit_tiny", depth=1).eval()
    x, state = model.begin(image((64, 96)))
    with pytest.raises(InputError, match=r"the block of layer 0 has the mixer 'llsa' .*: call it as block\(x, state\)"):
        model.blocks[0](x)
    assert model.blocks[0](x, state).shape == x.shape


def test_default_maps_follow_the_depth():
    for depth, wanted in ((12, (2, 5, 8, 11)), (6, (1, 2, 4, 5)), (2, (0, 1))):
        model = timm.create_model("mixer_vit_tiny", depth=depth, features_only=True, device="meta")
        assert model.feature_info.out_indices == wanted


@torch.no_grad()
def test_every_block_keeps_its_mixer_in_maps():
    """The last block of the variant for detectors runs on all tokens, with the mixer."""
    plain, dense = (
        build("mixer_vit_tiny", depth=2, mixer_options=SPARSE, norm_outputs=dense) for dense in (False, True)
    )
    dense.load_state_dict(plain.state_dict(), strict=False)
    dense.norm1.load_state_dict(plain.norm.state_dict())
    x = image((96, 160))
    wanted = plain.forward_intermediates(x, indices=[1], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(dense.forward_intermediates(x, indices=[1], intermediates_only=True)[0], wanted)

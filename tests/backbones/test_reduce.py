"""`terrazzo.reduce`: timm's own ViTs, reduced."""

import copy
import pickle

import pytest
import timm
import torch
from seeded import build, image

import terrazzo
from terrazzo.backbones import mctf
from terrazzo.errors import InputError

# Class token; registers, no class token in the positions, mean pooling, layer scale; distillation token; no prefix and
# attention pooling; norms of queries and keys, one more in front.
MODELS = {
    "deit_tiny_patch16_224": {},
    "vit_small_patch16_224": dict(
        embed_dim=96,
        num_heads=3,
        depth=4,
        global_pool="avg",
        reg_tokens=4,
        no_embed_class=True,
        init_values=0.1,
        qk_norm=True,
        pre_norm=True,
    ),
    "deit_tiny_distilled_patch16_224": dict(depth=4),
    "vit_base_patch16_siglip_224": dict(embed_dim=96, num_heads=3, depth=4),
}


@pytest.fixture(params=MODELS)
def vit(request):
    return build(request.param, **MODELS[request.param])


@torch.no_grad()
def test_without_merging_nothing_changes(vit):
    x = image((224, 224))
    wanted, maps = vit.forward_intermediates(x, indices=[0, 3])
    logits = vit(x)
    names = list(vit.state_dict())
    for restore in ("copy", "delta", "soft"):
        assert terrazzo.reduce(vit, r=0, restore=restore) is vit
        found, own = vit.forward_intermediates(x, indices=[0, 3])
        assert torch.equal(vit(x), logits)
        assert all(torch.equal(a, b) for a, b in zip((found, *own), (wanted, *maps)))
    assert list(vit.state_dict()) == names


@torch.no_grad()
def test_merges(vit):
    """Fewer tokens inside, and still all of timm's interface; what comes out is not far off."""
    x, before = image((224, 224), batch=2), copy.deepcopy(vit)
    terrazzo.reduce(vit, r=16)
    blocks, prefix = len(vit.blocks), vit.num_prefix_tokens
    assert vit(x).shape == before(x).shape
    assert not torch.equal(vit(x), before(x))
    pooled = vit.global_pool not in ("token", "")
    left = 196 + prefix - (0 if pooled else 16 * (blocks - 1))
    assert vit.forward_features(x).shape == (2, left, vit.embed_dim)
    assert vit.forward_head(vit.forward_features(x), pre_logits=True).shape[0] == 2
    features, maps = vit.forward_intermediates(x, indices=[0, 3], norm=True)
    torch.testing.assert_close(features, vit.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, vit.embed_dim, 14, 14)] * 2
    torch.testing.assert_close(maps[0], before.forward_intermediates(x, indices=[0], norm=True)[1][0])
    wanted = before.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
    assert torch.cosine_similarity(maps[1], wanted, dim=1).mean() > 0.5
    out = vit.forward_intermediates(x, indices=1, output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    assert out["image_intermediates"][0].shape == (2, 196, vit.embed_dim)
    assert ("image_intermediates_prefix" in out) == (prefix > 0)


@torch.no_grad()
def test_is_mctf():
    """On DeiT it computes what the registered model does."""
    deit, x = build("deit_tiny_patch16_224"), image((224, 224))
    model = timm.create_model("mctf_deit_tiny").eval()
    model.load_state_dict(mctf.checkpoint_filter_fn(deit.state_dict(), model), strict=True)
    torch.testing.assert_close(terrazzo.reduce(deit)(x), model(x))
    fast = timm.create_model("mctf_deit_tiny_fast").eval()
    fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(terrazzo.reduce(deit, r=0.35, blocks=(3, 6, 9))(x), fast(x))


def test_trains_and_copies():
    model, x = terrazzo.reduce(build("vit_tiny_patch16_224", depth=3)), image((224, 224))
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    wanted.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize(
    ("name", "options", "reduction", "message"),
    [
        ("resnet18", {}, {}, "only timm's plain VisionTransformer can be reduced, got ResNet"),
        ("vit_tiny_patch16_224", dict(attn_drop_rate=0.1), {}, "block 0 drops attention weights at 0.1"),
        ("vit_tiny_patch16_224", dict(patch_drop_rate=0.1), {}, "patch_drop_rate"),
        ("vit_srelpos_small_patch16_224", {}, {}, "only timm's plain VisionTransformer"),
        ("vit_small_patch16_36x1_224", {}, dict(method="tome"), "method must be one of asvit, mctf, got 'tome'"),
        (
            "vit_small_patch16_18x2_224",
            {},
            {},
            "block 0 is no plain block of timm with plain attention: ParallelThingsBlock",
        ),
        ("vit_tiny_patch16_224", {}, dict(restore="none"), "restore must be one of copy, delta, soft"),
        ("vit_tiny_patch16_224", {}, dict(r=-1), "r must be a part below 1"),
    ],
)
def test_errors(name, options, reduction, message):
    model = timm.create_model(name, device="meta", **options)
    with pytest.raises(InputError, match=message):
        terrazzo.reduce(model, **reduction)


def test_masks_are_refused():
    model = terrazzo.reduce(timm.create_model("vit_tiny_patch16_224", depth=2, device="meta"))
    with pytest.raises(InputError, match="takes no mask"):
        model.forward_features(torch.empty(1, 3, 224, 224, device="meta"), is_causal=True)

"""`terrazzo.reduce` on timm's ViTs."""

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support.module_contract import check_adapters, check_dynamic_int8, check_hooks, check_sharded
from support.seeded import build, image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

import terrazzo
from terrazzo.backbones import asvit, mctf
from terrazzo.errors import InputError

# The models have, in turn: a class token; registers, positions without a class token, mean pooling, layer scale, norms
# of queries and keys, a norm before the blocks; a distillation token; attention pooling without prefix tokens; rotary
# positions with registers (DINOv3); rotary positions with a gated MLP and separate projections (EVA-02); rotary
# positions with attention of another class (PE). Each has 14 x 14 patches.
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
    "vit_small_patch16_dinov3": dict(embed_dim=96, num_heads=3, depth=4, img_size=224),
    "eva02_tiny_patch14_224": dict(embed_dim=96, num_heads=3, depth=4, img_size=196),
    "vit_pe_core_tiny_patch16_384": dict(embed_dim=96, num_heads=3, depth=4, img_size=224),
}


def picture(vit, batch=1):
    side = 14 * vit.patch_embed.patch_size[0]
    return image((side, side), batch=batch)


@pytest.fixture(params=MODELS)
def vit(request):
    return build(request.param, **MODELS[request.param])


@torch.no_grad()
def test_without_merging_nothing_changes(vit):
    x = picture(vit)
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
    """Blocks have fewer tokens, timm's interface still works, and outputs stay similar."""
    x, before = picture(vit, batch=2), copy.deepcopy(vit)
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
    """On DeiT, results equal the registered model's results."""
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
        ("resnet18", {}, {}, "only timm's plain VisionTransformer and Eva can be reduced, got ResNet"),
        ("vit_tiny_patch16_224", dict(attn_drop_rate=0.1), {}, "block 0 drops attention weights at 0.1"),
        ("vit_tiny_patch16_224", dict(patch_drop_rate=0.1), {}, "patch_drop_rate"),
        ("vit_srelpos_small_patch16_224", {}, {}, "only timm's plain VisionTransformer and Eva"),
        (
            "vit_small_patch16_36x1_224",
            {},
            dict(method="tofu"),
            "method must be one of asvit, .*, got 'tofu'",
        ),
        (
            "vit_small_patch16_18x2_224",
            {},
            {},
            "block 0 is not a plain block of timm with plain attention: ParallelThingsBlock",
        ),
        ("vit_tiny_patch16_224", {}, dict(restore="none"), "restore must be one of copy, delta, soft"),
        ("vit_tiny_patch16_224", {}, dict(r=-1), "r must be a part below 1"),
        ("vit_tiny_patch16_224", {}, dict(blocks=(3, 12)), r"blocks must be some of 0 to 11, got \(3, 12\)"),
        ("vit_tiny_patch16_224", {}, dict(keep=(0.5,)), "options of 'mctf' are r, criteria, .*, got keep"),
        (
            "vit_tiny_patch16_224",
            {},
            dict(method="asvit", r=16),
            "options of 'asvit' are form, keep, thresholds, got r",
        ),
        ("vit_tiny_patch16_224", {}, dict(method="asvit", window=14), "so there can be no windows"),
        (
            "vit_tiny_patch16_224",
            {},
            dict(method="asvit", thresholds=(0.1,)),
            r"thresholds must hold a number for each of 3 stages, got \(0.1,\)",
        ),
        (
            "vit_base_patch16_siglip_224",
            {},
            dict(method="asvit"),
            "'asvit' needs a class token's attention, and this model has no class token",
        ),
    ],
)
def test_errors(name, options, reduction, message):
    model = timm.create_model(name, device="meta", **options)
    with pytest.raises(InputError, match=message):
        terrazzo.reduce(model, **reduction)


@pytest.mark.parametrize("check", [check_hooks, check_adapters, check_dynamic_int8, check_sharded])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mctf", dict(r=3)),
        ("mctf", dict(r=3, criteria=(1, 0, 40))),
        ("mctf", dict(r=1, blocks=(1,), window=3, global_blocks=(2,))),
        ("asvit", dict(blocks=(1, 2), thresholds=(0.04, 0.06))),
        ("asvit", dict(blocks=(1, 2), form="fixed", keep=(0.7, 0.5))),
        ("tome", dict(r=3)),
        ("diffrate", dict(keep=((1, 1), (0.8, 0.7), (0.5, 0.5)))),
    ],
)
def test_modules_are_called(check, method, options):
    """All modules are called, as in every registered backbone (`contract`), for every reducing block."""
    small = dict(embed_dim=48, num_heads=3, depth=3, dynamic_img_size=True, dynamic_img_pad=True)
    model = terrazzo.reduce(build("vit_tiny_patch16_224", **small), method=method, **options)
    if check is check_sharded and options.get("form") == "fixed":
        pytest.skip("the thresholds get no gradient")
    check(model)


def test_blocks_and_attention_are_called():
    """Each is called once in a forward pass, and a block's output has the next block's number of tokens."""
    model = terrazzo.reduce(build("vit_tiny_patch16_224", embed_dim=48, depth=3), r=16)
    shapes, calls = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: shapes.append((given[0].shape[1], out.shape[1])))
        block.attn.register_forward_hook(lambda _, __, out: calls.append(out.shape[1]))
    with torch.no_grad():
        model(image((224, 224)))
    assert shapes == [(197, 197), (197, 181), (181, 165)]
    assert calls == [197, 181, 165]


def test_masks_are_refused():
    model = terrazzo.reduce(timm.create_model("vit_tiny_patch16_224", depth=2, device="meta"))
    with pytest.raises(InputError, match="takes no mask"):
        model.forward_features(torch.empty(1, 3, 224, 224, device="meta"), is_causal=True)


class TestPruning:
    """Pruning by class attention, for models with a class token."""

    THRESHOLDS = (0.0050, 0.0060)  # within the range of both stages' scores
    OTHERS = {
        "vit_small_patch16_dinov3": (0.0050, 0.0140),
        "eva02_tiny_patch14_224": (0.0050, 0.0059),
        "vit_pe_core_tiny_patch16_384": (0.0050, 0.00625),
    }
    SMALL = dict(embed_dim=48, num_heads=3, depth=4)

    @pytest.fixture(params=[name for name in MODELS if "siglip" not in name])
    def vit(self, request):
        self.THRESHOLDS = self.OTHERS.get(request.param, self.THRESHOLDS)
        return build(request.param, **MODELS[request.param] | self.SMALL).double()

    def pruned(self, vit, **options):
        options = dict(blocks=(1, 3), thresholds=self.THRESHOLDS, form="packed") | options
        return terrazzo.reduce(vit, method="asvit", **options)

    @torch.no_grad()
    def test_a_batch_is_its_images(self, vit):
        """Each image keeps the same tokens as alone, and always its prefix tokens; maps have every position."""
        x, before = picture(vit, batch=2).double(), copy.deepcopy(vit)
        model = self.pruned(vit)
        tokens, state = model._begin(x, maps=False)
        for block in model.blocks:
            tokens = block(tokens, state)
        kept = model.reducer.kept(state)
        assert kept[:, : model.num_prefix_tokens].all()
        assert len(set(kept.sum(1).tolist())) > 1, "all images keep the same number: this proves nothing"
        assert all(10 < count < 190 for count in kept.sum(1).tolist())
        logits, features = model(x), model.forward_features(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert features.shape == before.forward_features(x).shape
        assert [tuple(found.shape) for found in maps] == [(2, vit.embed_dim, 14, 14)] * 4
        torch.testing.assert_close(maps[0], before.forward_intermediates(x, indices=[0], intermediates_only=True)[0])
        for i in range(2):
            alone = x[i : i + 1]
            torch.testing.assert_close(model(alone), logits[i : i + 1], rtol=0, atol=1e-10)
            torch.testing.assert_close(model.forward_features(alone), features[i : i + 1], rtol=0, atol=1e-10)
            for found, wanted in zip(model.forward_intermediates(alone, intermediates_only=True), maps):
                torch.testing.assert_close(found, wanted[i : i + 1], rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_forms_agree(self, vit):
        """The masked form agrees up to the effect of 1e-6; the fixed form agrees if it keeps the same number."""
        x = picture(vit).double()
        wanted, maps = self.pruned(vit).forward_intermediates(x, norm=True)
        tokens, state = vit._begin(x, maps=False)
        parts = []
        for block in vit.blocks:
            tokens = block(tokens, state)
            if state.depth - 1 in vit.reducer.blocks:
                parts.append((state.lengths[0] - vit.num_prefix_tokens + 0.5) / 196)
        for options, limit in ((dict(form="masked"), 1e-3), (dict(form="fixed", keep=parts), 1e-10)):
            features, own = self.pruned(vit, **options).forward_intermediates(x, norm=True)
            torch.testing.assert_close(features, wanted, rtol=limit, atol=limit)
            for found, map_ in zip(own, maps):
                torch.testing.assert_close(found, map_, rtol=limit, atol=limit)

    @torch.no_grad()
    def test_is_asvit(self):
        deit, x = build("deit_tiny_patch16_224", **self.SMALL), image((224, 224), batch=2)
        model = timm.create_model("asvit_deit_tiny", blocks=(1, 3), **self.SMALL).eval()
        model.load_state_dict(asvit.checkpoint_filter_fn(deit.state_dict(), model), strict=True)
        for threshold, value in zip(model.reducer.thresholds, self.THRESHOLDS):
            threshold.fill_(value)
        torch.testing.assert_close(self.pruned(deit, form="auto")(x), model(x))

    @pytest.mark.parametrize(
        ("name", "options", "blocks"),
        [
            ("asvit_deit_tiny", {}, (4, 7, 10)),
            ("asvit_lvvit_small", {}, (5, 9, 13)),
            ("asvit_lvvit_medium", {}, (6, 11, 16)),
            ("asvit_deit_tiny", dict(depth=8), (3, 5, 7)),
            ("asvit_deit_tiny", dict(depth=8, blocks=(2, 5)), (2, 5)),
        ],
    )
    def test_where_tokens_are_dropped(self, name, options, blocks):
        """The default is the authors' blocks; for another depth, blocks are evenly spread."""
        assert timm.create_model(name, device="meta", **options).reducer.blocks == blocks

    @torch.no_grad()
    @pytest.mark.parametrize("pool", ["avg", "max", "map", "token"])
    def test_poolings(self, pool):
        """Pooling takes every position, with a dropped token's last features, or the class token."""
        model = build("vit_tiny_patch16_224", global_pool=pool, **self.SMALL).double()
        x = image((224, 224), batch=2).double()
        whole = model.forward_intermediates(x, indices=[3], intermediates_only=True, norm=True)[0]
        self.pruned(model, restore="copy", full_last=0)
        (found,), tokens = model.forward_intermediates(x, [3], norm=True)[1], model.forward_features(x)
        if pool != "token":
            torch.testing.assert_close(tokens[:, 1:], found.flatten(2).transpose(1, 2))
        else:
            assert tokens.shape == (2, 197, 48)
        assert not torch.allclose(found, whole)
        torch.testing.assert_close(model(x), model.head(model.fc_norm(model.pool(tokens))))

    @torch.no_grad()
    def test_last_blocks_see_every_position(self, vit):
        """The last block runs on restored tokens when maps are requested, and only then."""
        x = picture(vit).double()
        model = self.pruned(vit, full_last=0)
        features, logits = model.forward_features(x), model(x)
        (before, after) = model.forward_intermediates(x, indices=[2, 3], return_prefix_tokens=True, output_fmt="NLC")[1]
        last = self.pruned(vit, full_last=1)
        (same, found) = last.forward_intermediates(x, indices=[2, 3], return_prefix_tokens=True, output_fmt="NLC")[1]
        assert torch.equal(same[0], before[0])
        assert not torch.allclose(found[0], after[0])
        ropes = last._begin(x, maps=True)[1].ropes
        wanted = last.blocks[3](torch.cat([same[1], same[0]], 1), **({} if ropes is None else dict(rope=ropes[3])))
        torch.testing.assert_close(torch.cat([found[1], found[0]], 1), wanted)
        if vit.global_pool == "token":
            torch.testing.assert_close(last.forward_features(x), features)
            torch.testing.assert_close(last(x), logits)
        with pytest.raises(InputError, match="full_last must be 0 to the 4 blocks, got 5"):
            self.pruned(vit, full_last=5)

    @pytest.mark.long
    @torch.no_grad()
    def test_maps_of_real_weights(self):
        """With weights of a DINOv2 ViT-S/14 and 70, 50 and 35 % of the patches kept, maps stay close to the model's."""
        weights = Path(__file__).parents[3] / "shared/weights/vit_small_patch14_dinov2.safetensors"
        photos = Path(__file__).parents[3] / "shared/data/photos"
        if not (weights.exists() and photos.exists()):
            pytest.skip("the real weights and photos are not here")
        model = timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True).eval()
        model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
        pictures = [Image.open(photos / f"cc0_{name}.jpg") for name in ("street_sunset", "singapore")]
        transform = create_transform((3, 336, 448), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, crop_pct=1.0)
        x = torch.stack([transform(picture.convert("RGB")) for picture in pictures])
        (wanted,) = model.forward_intermediates(x, indices=[11], norm=True, intermediates_only=True)
        terrazzo.reduce(model, method="asvit", form="fixed", keep=(0.7, 0.5, 0.35))
        (found,) = model.forward_intermediates(x, indices=[11], norm=True, intermediates_only=True)
        assert torch.cosine_similarity(found, wanted, dim=1).mean() > 0.93

    def test_thresholds_are_all_that_is_added(self):
        model = build("vit_tiny_patch16_224", **self.SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        self.pruned(model, form="auto")
        assert model.state_dict().keys() - before.keys() == {"reducer.thresholds.0", "reducer.thresholds.1"}
        assert [t.item() for t in model.reducer.thresholds] == pytest.approx(self.THRESHOLDS)
        model.load_state_dict(model.state_dict(), strict=True)
        with pytest.raises(RuntimeError, match=r'Missing key.*"reducer.thresholds.0", "reducer.thresholds.1"'):
            model.load_state_dict(before)
        model(image((224, 224))).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(threshold.grad != 0 for threshold in model.reducer.thresholds)
        self.pruned(model, form="fixed", keep=(0.5, 0.25))
        assert not any(threshold.requires_grad for threshold in model.reducer.thresholds)
        self.pruned(model, blocks=(), thresholds=())
        assert model.state_dict().keys() == before.keys()
        with torch.no_grad():
            plain = build("vit_tiny_patch16_224", **self.SMALL)
            assert torch.equal(model(image((224, 224))), plain(image((224, 224))))

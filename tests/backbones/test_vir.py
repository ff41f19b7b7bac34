"""ViR: the contract, the authors' outputs, equal forms, and its architecture."""

import math

import pytest
import timm
import torch
from support.contract import BackboneContract
from support.golden_packs import Pack, packs, sampled
from support.seeded import bare, build, image
from timm.layers import resample_abs_pos_embed

from terrazzo.backbones import vir
from terrazzo.backbones._place import Place
from terrazzo.errors import InputError
from terrazzo.tools.inspect.measure import measure

SMALL = dict(embed_dim=48, depth=2, num_heads=4, num_classes=7)
TINY = dict(embed_dim=16, depths=(1, 1, 2, 2), num_heads=(4, 4), num_classes=7)


class TestViR(BackboneContract):
    """Parameters equal the authors' code, and for the hybrids our specification.

    Multiply-adds of the isotropic models are counted as in the authors' code, with chunks in place of N x N matrices.
    """

    representatives = ("vir_small_patch16_224",)
    operators_of = "vmamba"
    untrained = (
        "vir_small_patch16_224",
        "vir_base_patch16_224",
        "vir_large_patch16_224",
        "vir_large_patch14_224",
        "vir_hybrid_tiny",
        "vir_hybrid_small",
    )
    shallow = {
        "vir_small_patch16_224": dict(depth=1),
        "vir_hybrid_tiny": dict(depths=(1, 1, 1, 1)),
    }
    costs = {
        "vir_small_patch16_224": (22_059_496, 4.548),
        "vir_base_patch16_224": (86_585_320, 17.462),
        "vir_large_patch16_224": (304_374_760, 61.283),
        "vir_large_patch14_224": (304_251_880, 79.819),
        "vir_hybrid_tiny": (23_645_096, 3.314),
        "vir_hybrid_small": (54_678_696, 8.126),
    }


def lively(name="vir_small_patch16_224", **kwargs):
    """A small model in float64 whose layer scales let every block matter."""
    model = build(name, **{**(TINY if "hybrid" in name else SMALL), **kwargs}).double()
    for block in model.modules():
        if isinstance(block, vir.Block):
            for scale in (block.ls1, block.ls2):
                torch.nn.init.normal_(scale.gamma, 1, 0.1)
    return model


class TestOfficial:
    @pytest.fixture(params=packs("vir"), ids=lambda path: path.stem)
    def pack(self, request):
        return Pack(request.param)

    def load(self, pack, **options):
        model = bare("vir_small_patch16_224", **pack.meta["kwargs"], **options).double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        model.load_state_dict(vir.checkpoint_filter_fn({"model": pack.weights()}, model), strict=True)
        return model

    @torch.no_grad()
    def test_golden(self, pack):
        """Logits, and the normalised tokens with the class token last."""
        model, case = self.load(pack), pack.meta["cases"][0]
        key, features = f"{case['size'][0]}x{case['size'][1]}.recurrent", model.forward_features(pack.image(case))
        torch.testing.assert_close(features[:, -1], torch.from_numpy(pack.arrays[f"{key}.last"]), rtol=0, atol=1e-8)
        found = sampled(f"{key}.features", features)
        torch.testing.assert_close(found, torch.from_numpy(pack.arrays[f"{key}.features"]), rtol=0, atol=1e-8)
        torch.testing.assert_close(model.forward_head(features), pack.logits(case), rtol=0, atol=1e-8)

    @torch.no_grad()
    def test_authors_forward_pass(self, pack):
        """With `parallel_softmax`, all tokens after each block and the logits."""
        model, case = self.load(pack, parallel_softmax=True), pack.meta["cases"][0]
        key, seen = f"{case['size'][0]}x{case['size'][1]}.parallel_softmax", []
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, out: seen.append(out))
        logits = model(pack.image(case))
        for i, found in enumerate(seen):
            name = f"{key}.stage{i}"
            wanted = torch.from_numpy(pack.arrays[name])
            torch.testing.assert_close(sampled(name, found), wanted, rtol=0, atol=1e-8)
        torch.testing.assert_close(logits, torch.from_numpy(pack.arrays[f"{key}.logits"]), rtol=0, atol=1e-8)
        with pytest.raises(InputError, match="dims=1 and directions=1 only, got dims=2 and directions=1"):
            timm.create_model("vir_small_patch16_224", dims=2, parallel_softmax=True, device="meta")

    def test_segmentors_backbone(self):
        """The last norm becomes the norm of the last map."""
        official = Pack(packs("vir")[0]).weights()
        model = timm.create_model("vir_small_patch16_224", norm_outputs=True, num_classes=0, device="meta")
        model.prune_intermediate_layers([11])
        weights = vir.checkpoint_filter_fn({f"backbone.{name}": value for name, value in official.items()}, model)
        assert torch.equal(weights["norm11.weight"], official["norm.weight"])
        assert model.state_dict().keys() == {name for name in weights if not name.startswith("head.")}

    def test_weights_of_a_vit(self):
        """The class token has no position here; without attention and retention, both models compute the same."""
        torch.manual_seed(0)
        vit = timm.create_model("vit_small_patch16_224", **SMALL, img_size=64).eval()
        model = timm.create_model("vir_small_patch16_224", **SMALL, img_size=64).eval()
        torch.nn.init.normal_(vit.pos_embed)
        vit.pos_embed.data[:, 0] = 0
        model.load_state_dict(vit.state_dict(), strict=True)
        assert torch.equal(model.stem.pos_embed, vit.pos_embed[:, 1:])
        assert torch.equal(model.blocks[1].retention.qkv.weight, vit.blocks[1].attn.qkv.weight)
        with torch.no_grad():
            for block, other in zip(model.blocks, vit.blocks):
                for layer in (block.retention.proj_out, other.attn.proj):
                    layer.weight.zero_()
            torch.testing.assert_close(model(image((64, 64))), vit(image((64, 64))))

    def test_weights_for_another_size(self):
        official = {"pos_embed": torch.randn(1, 196, 48), "norm.weight": torch.ones(48)}
        model = timm.create_model("vir_small_patch16_224", **SMALL, img_size=96)
        found = vir.checkpoint_filter_fn(official, model)["stem.pos_embed"]
        torch.testing.assert_close(found, resample_abs_pos_embed(official["pos_embed"], [6, 6], [14, 14], 0))


class TestForms:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vir_small_patch16_224", {}),
            ("vir_small_patch16_224", dict(dims=2)),
            ("vir_small_patch16_224", dict(dims=2, directions=4)),
            ("vir_hybrid_tiny", {}),
        ],
        ids=["sequence", "map", "four directions", "hybrid"],
    )
    def test_are_equal(self, name, options):
        """Logits and maps, also with chunks that do not divide the tokens; float32 differs by rounding only."""
        x, results = image((80, 112)).double(), []
        for form, chunk in (("parallel", None), ("recurrent", None), ("chunked", None), ("chunked", 3)):
            model = lively(name, form=form, chunk=chunk, **options)
            features, maps = model.forward_intermediates(x)
            results.append([model.forward_head(features), *maps])
        for found in results[1:]:
            torch.testing.assert_close(found, results[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(model.float()(x.float()).double(), results[0][0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "gmacs"),
        [
            ("vir_small_patch16_224", 4.599),
            ("vir_base_patch16_224", 17.564),
            pytest.param("vir_large_patch16_224", 61.555, marks=pytest.mark.slow),
        ],
    )
    def test_macs_of_the_parallel_form(self, name, gmacs):
        """The authors' code computes N x N matrices; its multiply-adds are counted as ours."""
        model = timm.create_model(name, form="parallel", device="meta")
        assert measure(model, (224, 224), 3).macs / 1e9 == pytest.approx(gmacs, abs=5e-4)

    def test_cost_grows_with_the_number_of_patches(self):
        """Four times as many patches take four times as many multiply-adds; on maps the rows are longer, too."""
        for least, most, options in ((3.9, 4.05, {}), (4, 4.6, dict(dims=2)), (7, 8, dict(form="parallel"))):
            model = timm.create_model("vir_small_patch16_224", depth=1, device="meta", **options)
            small, large = (measure(model, (side, side), 3).macs for side in (512, 1024))
            assert least < large / small < most


def reached(model, row, column, size=(64, 80)):
    """Which patches of the image a position of the last map depends on, and whether the class token sees them."""
    x = image(size).double().requires_grad_()
    _, maps = model.forward_intermediates(x)
    (grad,) = torch.autograd.grad(maps[-1][0, :, row, column].sum(), x)
    return grad.abs().unfold(2, 16, 16).unfold(3, 16, 16).sum((0, 1, 4, 5)) > 1e-12


class TestArchitecture:
    def test_causality(self):
        """In one direction a patch depends on earlier patches alone; on maps, on none below or on the right."""
        rows, columns = torch.arange(4)[:, None], torch.arange(5)
        earlier = (rows < 2) | ((rows == 2) & (columns <= 3))
        assert torch.equal(reached(lively(), 2, 3), earlier)
        assert torch.equal(reached(lively(dims=2), 2, 3), (rows <= 2) & (columns <= 3))
        assert reached(lively(dims=2, directions=4), 2, 3).all()
        assert reached(lively(parallel_softmax=True), 2, 3).all(), "the authors' softmax is not causal"

    @pytest.mark.parametrize("options", [{}, dict(dims=2), dict(dims=2, directions=4)], ids=str)
    def test_class_token_sees_all_and_nothing_sees_it(self, options):
        model, x = lively(**options), image((64, 80)).double()
        with torch.no_grad():
            features = model.forward_features(x)
            torch.nn.init.normal_(model.stem.cls_token)
            changed = (model.forward_features(x) - features).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [False] * 20 + [True]
        x.requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x)
        assert (grad.abs().unfold(2, 16, 16).unfold(3, 16, 16).sum((0, 1, 4, 5)) > 1e-12).all()

    @torch.no_grad()
    def test_retention_by_its_definition(self):
        """Projections with biases, the scale D^-1/2, decays by head, the class token last; no gates and no norms."""
        layer = lively(embed_dim=12, num_heads=2).blocks[0].retention
        torch.nn.init.normal_(layer.qkv.weight)
        x = torch.randn(1, 7, 12, dtype=torch.float64)
        q, k, v = layer.qkv(x)[0].unflatten(1, (3, 2, 6)).unbind(1)
        wanted = torch.zeros(7, 2, 6, dtype=torch.float64)
        for head, decay in enumerate((1 - 1 / 32, 1 - 1 / 512)):
            for n in range(7):
                for m in range(n + 1):
                    product = (q[n, head] @ k[m, head]) / math.sqrt(6)
                    wanted[n, head] += decay ** (n - m) * product * v[m, head]
        torch.testing.assert_close(layer(x)[0], layer.proj_out(wanted.flatten(1)), rtol=1e-10, atol=1e-10)

    @torch.no_grad()
    def test_the_class_token_stands_below_the_last_column(self):
        """On a map of 2 x 2 it is at distance 1 from the last patch, and at distance 3 from the first."""
        mixer = lively(dims=2).blocks[0].retention.mixer
        one = torch.ones(1, 4, 5, 12, dtype=torch.float64)
        decay = vir.decays(4, one).exp()
        found = mixer(one, one, one, Place((2, 2)))[0, :, 4, 0] / math.sqrt(12)
        torch.testing.assert_close(found, 1 + decay + 2 * decay**2 + decay**3)

    @torch.no_grad()
    def test_stem(self):
        """Positions are the parameter at the native size; the class token has none, and comes last."""
        model = lively(img_size=64)
        model.stem.proj.weight.zero_()
        model.stem.proj.bias.zero_()
        tokens, state = model.begin(image((64, 64)).double())
        assert state.grid == (4, 4)
        assert torch.equal(tokens[:, :16], model.stem.pos_embed)
        assert torch.equal(tokens[:, 16:], model.stem.cls_token)
        for size in ((2, 3), (9, 4)):
            tokens, state = model.begin(image((16 * size[0], 16 * size[1])).double())
            wanted = resample_abs_pos_embed(model.stem.pos_embed, list(size), [4, 4], 0)
            assert state.grid == size
            torch.testing.assert_close(tokens[:, :-1], wanted, rtol=0, atol=1e-6)  # timm resizes in float32

    @pytest.mark.long
    def test_patches_of_14(self):
        model = timm.create_model("vir_large_patch14_224", device="meta")
        assert model.forward_features(torch.empty(1, 3, 224, 280, device="meta")).shape == (1, 16 * 20 + 1, 1024)

    def test_initial_values(self):
        model = timm.create_model("vir_small_patch16_224", depth=1)
        assert 0 < model.stem.cls_token.abs().max() < 1e-5
        assert model.stem.pos_embed.detach().std() == pytest.approx(0.02, rel=0.02)
        block = model.blocks[0]
        assert block.retention.qkv.weight.detach().std() == pytest.approx(0.02, rel=0.02)
        assert not block.retention.qkv.bias.any()
        assert not model.head.fc.bias.any()
        assert all(torch.equal(s.gamma, torch.full((384,), 1e-5)) for s in (block.ls1, block.ls2))

    def test_default_features(self):
        model = timm.create_model("vir_large_patch16_224", features_only=True, device="meta")
        assert model.feature_info.out_indices == (5, 11, 17, 23)

    def test_options_are_checked(self):
        with pytest.raises(InputError, match="form must be one of parallel, chunked, recurrent, got 'softmax'"):
            timm.create_model("vir_small_patch16_224", form="softmax", device="meta")
        block = timm.create_model("vir_small_patch16_224", dims=2, device="meta").blocks[0]
        with pytest.raises(InputError, match=r"call it as block\(x, state\) with model.begin\(image\)"):
            block(torch.empty(1, 5, 384, device="meta"))

    def test_hybrid(self):
        """Convolutions see their neighbours; retention in four directions sees the whole map."""
        model = lively("vir_hybrid_tiny")
        assert [type(stage.blocks[0]).__name__ for stage in model.stages] == ["ConvBlock"] * 2 + ["MapBlock"] * 2
        x = image((64, 96)).double().requires_grad_()
        _, maps = model.forward_intermediates(x)
        for i, whole in ((1, False), (2, True)):
            (grad,) = torch.autograd.grad(maps[i][0, :, 1, 1].sum(), x, retain_graph=True)
            assert bool((grad.abs().sum((0, 1)) > 1e-15).all()) == whole

    def test_hybrid_of_any_size(self):
        """Maps have the stated strides; every parameter learns, and checkpointing changes no gradient."""
        model, gradients = build("vir_hybrid_tiny", **TINY), []
        _, maps = model.forward_intermediates(image((97, 131)))
        assert [tuple(x.shape[1:]) for x in maps] == [(16, 25, 33), (32, 13, 17), (64, 7, 9), (128, 4, 5)]
        for again in (False, True):
            model.set_grad_checkpointing(again)
            model.zero_grad()
            model(image((64, 96), batch=2)).square().sum().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0])
        assert all(grad.isfinite().all() and grad.any() for grad in gradients[0].values())

"""InfViT: the contract, official weights, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, normal, packs
from support.seeded import bare, build, image
from torch import nn

from terrazzo.backbones import infvit
from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers import Host, create_mixer
from terrazzo.errors import InputError

SMALL = dict(embed_dim=48, num_heads=3, depth=2, patch_size=8, img_size=64)
LINEAR, PURE = "infvit_linear_4l_patch16_224", "infvit_pure_4l_patch16_224"


class TestInfViT(BackboneContract):
    """Parameters are the paper's counts. Multiply-adds in G: the paper's do not fit its models (see the card)."""

    representatives = (LINEAR,)
    operators_of = "s2aformer"
    untrained = (LINEAR, PURE, "infvit_pure_24l_patch16_224")
    shallow = {LINEAR: dict(embed_dim=64, num_heads=2, depth=1)}
    costs = {
        LINEAR: (53_451_756, 9.2519),
        PURE: (57_650_156, 11.2157),
        "infvit_pure_24l_patch16_224": (330_566_656, 66.5134),
    }


def settings(pack):
    """The arguments of our model that equal a pack's arguments of the official example network."""
    given = pack.meta["kwargs"]
    same = {key: given[key] for key in ("img_size", "patch_size", "num_classes", "embed_dim", "num_heads")}
    kind = given["variant"].removesuffix("_infsa")
    return dict(same, kind=kind, depth=given["num_layers"], pre_logits=False, extra_proj=False)


class TestOfficial:
    @pytest.mark.parametrize("path", packs("infvit"), ids=lambda path: path.stem)
    @pytest.mark.parametrize("tokens", [2**14, 50])
    def test_golden(self, path, tokens, monkeypatch):
        """Tokens, logits and gradients of the official network, with all tokens at once and in parts."""
        monkeypatch.setattr(infvit, "TOKENS", tokens)
        pack = Pack(path)
        model = bare(LINEAR, **settings(pack)).double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = infvit.checkpoint_filter_fn(pack.weights(), model)
        model.load_state_dict(weights, strict=True)
        rhos = [block.attn.rho(torch.float64).item() for block in model.blocks]
        assert rhos == pytest.approx(pack.meta["rho"], rel=1e-12)
        kept = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, out: kept.append(out))
        for case in pack.meta["cases"]:
            kept.clear()
            logits = model(pack.image(case))
            for i, found in enumerate(kept):
                assert list(found.shape) == case["stages"][i]["shape"]
                torch.testing.assert_close(*pack.sample(case, i, found), rtol=0, atol=1e-8)
            torch.testing.assert_close(logits, pack.logits(case), rtol=0, atol=1e-8)
            model.zero_grad()
            (logits * normal(f"grad:{case['size'][0]}x{case['size'][1]}", logits.shape)).sum().backward()
            ours = dict(zip(pack.weights(), weights))
            for name, official in case["grad_norms"].items():
                found = model.get_parameter(ours[name]).grad.norm().item()
                if official is None:
                    assert name.endswith("rho_logit")
                    assert found > 0
                else:
                    assert found == pytest.approx(official, rel=1e-8), name

    @pytest.mark.parametrize(
        ("arguments", "parameters"),
        [
            (dict(kind="softmax", extra_proj=True), 57_650_152),  # the paper's baseline has no rho
            (dict(kind="linear", pre_logits=False), 52_402_156),
            (dict(kind="pure", pre_logits=False), 52_402_156),
            (dict(kind="pure", pre_logits=False, depth=24), 304_326_656),
        ],
    )
    def test_other_counts(self, arguments, parameters):
        model = timm.create_model(LINEAR, device="meta", **arguments)
        assert sum(p.numel() for p in model.parameters()) == parameters

    @pytest.mark.parametrize("kind", ["linear", "pure"])
    def test_names_of_the_module(self, kind):
        attn = timm.create_model(LINEAR, kind=kind, **SMALL).blocks[0].attn
        parts = [f"{part}.{kind}" for part in ["q_proj", "k_proj", "v_proj", "proj_out"] for kind in ("weight", "bias")]
        assert sorted(attn.state_dict()) == sorted(["rho_logit", *parts])

    def test_weights_of_a_vit(self):
        """timm's plain ViT gives everything but rho and the additional layer, which keep the model's values."""
        torch.manual_seed(0)
        vit = timm.create_model("vit_base_patch16_224", **SMALL)
        model = build(PURE, pre_logits=False, **SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(vit.state_dict(), strict=True)
        after = model.state_dict()
        for i in range(2):
            qkv = torch.cat([after[f"blocks.{i}.attn.{part}_proj.weight"] for part in "qkv"])
            assert torch.equal(qkv, vit.blocks[i].attn.qkv.weight)
            assert torch.equal(after[f"blocks.{i}.attn.proj_out.bias"], vit.blocks[i].attn.proj.bias)
            for name in (f"blocks.{i}.attn.rho_logit", f"blocks.{i}.attn.mix_proj.weight"):
                assert torch.equal(after[name], before[name])
        softmax = build(PURE, kind="softmax", pre_logits=False, extra_proj=False, **SMALL)
        softmax.load_state_dict(vit.state_dict(), strict=True)
        for norm in (module for module in softmax.modules() if isinstance(module, nn.LayerNorm)):
            norm.eps = 1e-6
        x = image((64, 64))
        torch.testing.assert_close(softmax(x), vit.eval()(x), rtol=1e-4, atol=1e-5)

    def test_positions_of_another_size(self):
        small = build(LINEAR, **SMALL)
        large = build(LINEAR, **{**SMALL, "img_size": 96})
        large.load_state_dict(small.state_dict(), strict=True)
        x = image((96, 96))
        torch.testing.assert_close(large(x), small(x))


class TestArchitecture:
    @pytest.mark.parametrize(("kind", "mixer"), [("linear", "linear_infsa"), ("pure", "infsa"), ("softmax", None)])
    def test_attention_equals_the_mixer(self, kind, mixer):
        torch.manual_seed(0)
        attn = infvit.KINDS[kind](24, 3, True, 0.7, True).double()
        for value in attn.parameters():
            nn.init.normal_(value, 0, 0.5)
        x = torch.randn(2, 30, 24, dtype=torch.float64)
        q, k, v = (attn.by_head(layer(x), x.dtype) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        if mixer is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            made = create_mixer(mixer, Host(24, 3, 8)).double()
            made.load_state_dict({"rho_logit": attn.rho_logit.detach()})
            out = made(q, k, v, Place((5, 6)))
        wanted = attn.proj_out(attn.mix_proj(out.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(attn(x), wanted)

    def test_begins_as_the_official_module(self):
        """The additional layer is the identity at the start."""
        model, plain = build(PURE, **SMALL), build(PURE, **SMALL, extra_proj=False)
        names = plain.state_dict().keys()
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
        attn = timm.create_model(PURE, **SMALL).blocks[0].attn
        assert torch.equal(attn.mix_proj.weight, torch.eye(48))
        assert not attn.mix_proj.bias.any()
        for block in model.blocks:
            block.attn.mix_proj = None
        x = image((64, 64))
        torch.testing.assert_close(model(x), plain(x))

    @pytest.mark.parametrize("kind", ["linear", "pure"])
    def test_parts_change_nothing(self, kind, monkeypatch):
        model, x = build(LINEAR, kind=kind, **SMALL), image((72, 50), batch=2)
        wanted = model(x)
        monkeypatch.setattr(infvit, "TOKENS", 7)
        torch.testing.assert_close(model(x), wanted)

    @torch.no_grad()
    def test_memory_of_the_linear_form(self, monkeypatch):
        """No layer sees more tokens than a part, and queries, keys and values never exist for the whole image."""
        monkeypatch.setattr(infvit, "TOKENS", 16)
        model, seen = build(LINEAR, **SMALL), []
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
        model(image((64, 64)))
        assert max(seen) == 16
        assert seen.count(1) == 2 * (2 + 4)  # the last projection of each block, and the rest of 65 tokens

    @pytest.mark.parametrize("kind", ["linear", "pure"])
    def test_rho_learns(self, kind):
        model, x = build(LINEAR, kind=kind, **SMALL), image((64, 64))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = [block.attn.rho_logit.item() for block in model.blocks]
        model(x).square().sum().backward()
        optimizer.step()
        assert all(block.attn.rho_logit.item() != old for block, old in zip(model.blocks, before))
        frozen = timm.create_model(LINEAR, kind=kind, rho_trainable=False, rho=0.9, **SMALL)
        assert not any(block.attn.rho_logit.requires_grad for block in frozen.blocks)
        assert frozen.blocks[0].attn.rho(torch.float32).item() == pytest.approx(0.9)

    def test_pure_form_keeps_no_matrix(self):
        """No saved tensor of the pure form has N x N numbers."""
        model, kept = build(PURE, **{**SMALL, "patch_size": 1, "img_size": 24, "embed_dim": 8, "num_heads": 1}), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(image((24, 24))).sum().backward()
        assert max(kept) <= 577 * 32

    def test_layer_before_the_classifier(self):
        model = build(LINEAR, **SMALL)
        x = image((64, 64))
        features = model.forward_features(x)
        hidden = torch.tanh(model.head.pre_logits(features[:, 0]))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), hidden)
        torch.testing.assert_close(model(x), model.head.fc(hidden))
        weight = model.head.pre_logits.weight
        model.reset_classifier(5)
        assert model.head.pre_logits.weight is weight, "fine-tuning keeps the layer"
        model.reset_classifier(0)
        assert not [name for name in model.state_dict() if name.startswith("head")]

    def test_table_as_it_is(self):
        """As in the official network, a grid with as many patches takes the table as it is; another grid resizes it."""
        stem = build(LINEAR, **SMALL).stem
        assert torch.equal(stem.positions((4, 16)), stem.pos_embed)
        assert stem.positions((4, 17)).shape == (1, 69, 48)

    def test_maps(self):
        model = timm.create_model("infvit_pure_24l_patch16_224", features_only=True, device="meta")
        assert model.feature_info.out_indices == (5, 11, 17, 23)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (dict(kind="cubic"), "kind must be one of linear, pure, softmax, got 'cubic'"),
            (dict(num_heads=5), "embed_dim must be a multiple of num_heads, got 1024 and 5"),
            (dict(rho=1), "rho must be between 0 and 1, got 1"),
        ],
    )
    def test_wrong_arguments(self, arguments, error):
        with pytest.raises(InputError, match=error):
            timm.create_model(LINEAR, device="meta", **arguments)


class TestPure:
    """What the contract tests on its representative, the linear form."""

    @pytest.mark.long
    def test_compile(self):
        torch._dynamo.reset()
        model = build(PURE, **SMALL)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.no_grad():
            for size in ((64, 96), (96, 70)):
                torch.testing.assert_close(compiled(image(size)), model(image(size)), rtol=1e-4, atol=1e-5)

    def test_checkpointing_and_any_size(self):
        model, x = build(PURE, **SMALL), image((50, 72), batch=2)
        out = model(x)
        out.sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert all(grad.isfinite().all() for grad in wanted.values())
        model.zero_grad()
        model.set_grad_checkpointing()
        again = model(x)
        torch.testing.assert_close(again, out)
        again.sum().backward()
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, wanted)
        torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow  # the contract exports the linear form
    def test_onnx(self, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        model = build(PURE, **SMALL)
        report = onnx_export.export_onnx(model, image((97, 70)), tmp_path / "model.onnx", dynamic=("batch", "hw"))
        assert report.passed, report

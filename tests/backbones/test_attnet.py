"""AttNet: the contract, official weights, and its architecture."""

import pytest
import timm
import torch
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare
from torch import nn

from terrazzo.backbones import attnet


class TestAttNet(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds in G are for a map pooled before its projection."""

    representatives = ("attnet_xxs",)
    shallow = {"attnet_xxs": dict(depths=(1, 1), dims=(32, 64), mlp_norm=True, layer_scale=1e-6)}
    costs = {
        "attnet_xxs": (2_853_556, 0.5011),
        "attnet_xs": (5_554_902, 0.9427),
        "attnet_s": (7_681_316, 1.2424),
        "attnet_t1": (13_714_900, 2.2554),
        "attnet_t2": (27_010_782, 4.7333),
        "attnet_t3": (49_175_682, 8.7021),
        "attnet_t4": (87_320_214, 15.5485),
    }


# The authors' classes: the convolutions' multiply-adds in G at 224 by fvcore, and the entries of the state dict.
OFFICIAL = {
    "attnet_xxs": (0.5304, 224),
    "attnet_xs": (1.0039, 307),
    "attnet_s": (1.3269, 376),
    "attnet_t1": (2.4208, 474),
    "attnet_t2": (5.0884, 584),
    "attnet_t3": (9.3807, 870),
    "attnet_t4": (16.7234, 980),
}


class TestOfficial:
    @pytest.mark.parametrize("path", packs("attnet"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        model = bare(f"attnet_{pack.meta['variant'].lower()}").double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = attnet.checkpoint_filter_fn({"model": pack.weights(), "epoch": 299}, model)
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        assert not counters.keys() & weights.keys()
        model.load_state_dict(weights | counters, strict=True)
        for case in pack.meta["cases"]:
            x = pack.image(case)
            with torch.no_grad():
                for i, found in enumerate(model.forward_intermediates(x, intermediates_only=True)):
                    assert list(found.shape) == case["stages"][i]["shape"]
                    ours, official = pack.sample(case, i, found)
                    torch.testing.assert_close(ours, official, rtol=0, atol=1e-8)
                torch.testing.assert_close(model(x), pack.logits(case), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", OFFICIAL)
    def test_entries_and_multiply_adds(self, name):
        """The authors project whole maps for kernels before they pool; fvcore counts neither bins nor classifier."""
        model = timm.create_model(name, device="meta")
        gmacs, entries = OFFICIAL[name]
        assert len(model.state_dict()) == entries
        total = TestAttNet.costs[name][1] * 1e9 - model.head.fc.weight.numel()
        for info, stage in zip(model.feature_info, model.stages):
            channels, positions = info["num_chs"], (224 // info["reduction"]) ** 2
            total += len(stage.blocks) * channels * (channels * (positions - 9) - 81)
        assert total / 1e9 == pytest.approx(gmacs, abs=1.5e-4)

    def test_own_names_pass(self):
        """A checkpoint with our names passes the filter."""
        model = timm.create_model("attnet_t1", norm_outputs=True, num_classes=0, device="meta")
        assert attnet.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()

    def test_weights_are_not_fetched(self):
        """timm cannot load files from the authors' folder."""
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model("attnet_xxs", pretrained=True)


class TestArchitecture:
    def test_flags_of_the_variants(self):
        for name, (layer_scale, norm) in {
            "attnet_xxs": (False, False),
            "attnet_xs": (True, False),
            "attnet_s": (False, False),
            "attnet_t1": (True, True),
        }.items():
            names = timm.create_model(name, device="meta").state_dict().keys()
            assert ("stages.0.blocks.0.layer_scale_1.gamma" in names) == layer_scale
            assert ("stages.0.blocks.0.channel_mixer.norm_layer.weight" in names) == norm

    def test_gate_is_the_first_half(self):
        """Without a value the output is 0; without a gate it depends on the depthwise bias times the value."""
        torch.manual_seed(0)
        mlp = attnet.GatedMlp(6, 8, norm=False)
        x = torch.randn(1, 6, 5, 4)
        with torch.no_grad():
            mlp.fc2.bias.zero_()
            mlp.fc1.weight[:8].zero_()
            mlp.fc1.bias[:8].zero_()
            value = mlp.fc1(x)[:, 8:]
            wanted = mlp.fc2(nn.functional.gelu(mlp.dwconv.bias)[:, None, None] * value)
            torch.testing.assert_close(mlp(x), wanted)
            mlp.fc1.weight[8:].zero_()
            mlp.fc1.bias[8:].zero_()
            assert not mlp(x).any()

    def test_fixed_kernels_make_the_mixer_linear(self):
        """If mixing is 0, all kernels equal its bias: with 1 in the middle, the convolution is the identity."""
        torch.manual_seed(0)
        mixer = attnet.AttentiveConv(6, 3).double()
        x = torch.randn(2, 6, 7, 5, dtype=torch.double)
        with torch.no_grad():
            mixer.kernel_gen.weight.zero_()
            mixer.kernel_gen.bias.copy_(torch.arange(9) == 4)
            mixer.difference_control.fill_(-100)
            torch.testing.assert_close(mixer(x), mixer.proj(mixer.x_proj(x)))

    def test_head_normalises_the_pooled_vector(self):
        model = build("attnet_xxs")
        x = image((64, 96))
        with torch.no_grad():
            pooled = model.forward_features(x).mean((2, 3))
            norm = model.head.norm
            wanted = model.head.fc(nn.functional.layer_norm(pooled, (240,), norm.weight, norm.bias))
            torch.testing.assert_close(model(x), wanted)

    def test_head_without_pooling_has_no_idle_norm(self):
        model = timm.create_model("attnet_xxs")
        model.reset_classifier(0, "")
        for unpooled in (model, timm.create_model("attnet_xxs", num_classes=0, global_pool="")):
            assert not [name for name in unpooled.state_dict() if name.startswith("head")]
            assert unpooled(image((64, 64))).shape == (1, 240, 2, 2)
        model.reset_classifier(3, "avg")
        assert model(image((64, 64))).shape == (1, 3)
        assert "head.norm.weight" in model.state_dict()

    def test_kernels_depend_on_the_proportions(self):
        """The map is flattened before it is pooled, so a transposed image does not give the transposed map."""
        mixer = attnet.AttentiveConv(4, 3)
        nn.init.normal_(mixer.kernel_gen.weight)
        x = torch.randn(1, 4, 6, 9)
        assert not torch.allclose(mixer(x.mT).mT, mixer(x), atol=1e-3)

    def test_another_kernel_size(self):
        model = timm.create_model("attnet_xxs", kernel_size=5, depths=(1, 1, 1, 1))
        assert model(image((64, 64))).shape == (1, 1000)
        assert model.stages[0].blocks[0].token_mixer.kernel_gen.weight.shape == (25, 25)


class TestExport:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["attnet_xxs", "attnet_t1"])
    def test_whole_models(self, name, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        report = onnx_export.export_onnx(build(name), image((97, 70)), tmp_path / "model.onnx", dynamic=("batch", "hw"))
        assert report.passed, report
        assert report.worst <= 1e-4

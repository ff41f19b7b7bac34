"""NAT, DiNAT, DiNAT_s and the isotropic models: the contract, official weights, and their architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, packs
from support.seeded import bare, build, image

from terrazzo.backbones import dinat
from terrazzo.errors import InputError


class TestNAT(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds in G: convolutions, linear layers and attention."""

    representatives = ("dinat_mini", "dinat_s_tiny", "dinat_isotropic_small")
    shallow = {
        "dinat_mini": dict(depths=(1, 1), num_heads=(2, 4), dilations=[[4], [1]]),
        "dinat_s_tiny": dict(depths=(1, 1, 2, 1), dilations=[[1], [1], [1, 2], [1]]),
        "dinat_isotropic_small": dict(dilations=(1, 2)),
    }
    refused = {
        "onnx dynamic hw": "neighborhood attention is exported for images of one size: its windows become constants"
    }
    costs = {
        "nat_mini": (19_984_174, 2.695),
        "nat_tiny": (27_901_582, 4.295),
        "nat_small": (50_743_297, 7.772),
        "nat_base": (89_769_652, 13.677),
        "dinat_mini": (19_984_174, 2.695),
        "dinat_tiny": (27_901_582, 4.295),
        "dinat_small": (50_719_681, 7.772),
        "dinat_base": (89_769_652, 13.677),
        "dinat_large": (200_943_514, 30.458),
        "dinat_large_384": (200_943_514, 89.505),
        "dinat_large_384_11x11": (201_144_250, 92.085),
        "dinat_s_tiny": (28_288_354, 4.491),
        "dinat_s_small": (49_606_258, 8.741),
        "dinat_s_base": (87_768_224, 15.431),
        "dinat_s_large": (196_532_476, 34.476),
        "dinat_s_large_384": (196_532_476, 101.314),
        "nat_isotropic_small": (21_999_736, 4.309),
        "nat_isotropic_base": (86_465_800, 16.941),
        "dinat_isotropic_small": (21_999_736, 4.309),
        "dinat_isotropic_base": (86_465_800, 16.941),
    }


DENSE = {
    "dinat_mini": 19_472_070,
    "dinat_tiny": 27_389_478,
    "nat_small": 49_975_641,
    "dinat_small": 49_952_025,
    "dinat_base": 88_746_444,
    "dinat_large": 199_409_202,
    "dinat_large_384_11x11": 199_609_938,
    "dinat_s_tiny": 27_520_698,
    "dinat_s_base": 86_745_016,
    "dinat_s_large": 194_998_164,
}


class TestOfficial:
    @pytest.mark.parametrize("path", packs("dinat"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        dense = pack.meta["task"] != "cls"
        arguments = (
            {"num_classes": 0, "norm_outputs": True, "dilations": pack.meta["kwargs"]["dilations"]} if dense else {}
        )
        model = bare(pack.meta["variant"], **arguments).double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = dinat.checkpoint_filter_fn(pack.weights(), model)
        model.load_state_dict(weights, strict=True)
        indices = [len(model.feature_info) - 1] if "isotropic" in path.stem else None
        for case in pack.meta["cases"]:
            x = pack.image(case)
            with torch.no_grad():
                maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
                for i, found in enumerate(maps):
                    assert list(found.shape) == case["stages"][i]["shape"]
                    ours, official = pack.sample(case, i, found)
                    torch.testing.assert_close(ours, official, rtol=0, atol=1e-8)
                if not dense:
                    torch.testing.assert_close(model(x), pack.logits(case), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", DENSE)
    def test_dense_parameters(self, name):
        model = timm.create_model(name, num_classes=0, norm_outputs=True, device="meta")
        assert sum(p.numel() for p in model.parameters()) == DENSE[name]

    def test_detector_checkpoint(self):
        """A detector's file has weights under `state_dict`, a prefix of the backbone's names, and weights of heads."""
        pack = Pack(next(path for path in packs("dinat") if path.stem == "dinat_mini.det"))
        weights = {f"backbone.{name}": value for name, value in pack.weights().items()}
        checkpoint = {"meta": {"epoch": 36}, "state_dict": {**weights, "rpn_head.conv.weight": torch.zeros(1)}}
        model = bare("dinat_mini", num_classes=0, norm_outputs=True)
        model.load_state_dict(dinat.checkpoint_filter_fn(checkpoint, model), strict=True)

    def test_hub_names(self):
        """The hub's copies separate query, key and value, and put both layer scales into one tensor."""
        torch.manual_seed(0)
        model = timm.create_model("nat_small", depths=(1, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8)).eval()
        hub = {}
        for name, value in model.state_dict().items():
            for i in range(3):
                name = name.replace(f"stages.{i + 1}.downsample", f"nat.encoder.levels.{i}.downsample")
            name = name.replace("stages.", "nat.encoder.levels.").replace(".blocks.", ".layers.")
            name = name.replace("stem.proj", "nat.embeddings.patch_embeddings.projection")
            name = name.replace("stem.norm", "nat.embeddings.norm").replace("head.fc", "classifier")
            name = "nat.layernorm." + name[5:] if name.startswith("norm.") else name
            for ours, theirs in (
                (".norm1.", ".layernorm_before."),
                (".norm2.", ".layernorm_after."),
                (".attn.rpb", ".attention.self.rpb"),
                (".attn.proj.", ".attention.output.dense."),
                (".mlp.fc1.", ".intermediate.dense."),
                (".mlp.fc2.", ".output.dense."),
            ):
                name = name.replace(ours, theirs)
            if ".attn.qkv." in name:
                for part, third in zip(("query", "key", "value"), value.chunk(3)):
                    hub[name.replace(".attn.qkv.", f".attention.self.{part}.")] = third
            elif name.endswith(".gamma1"):
                hub[name.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, value * 0 + 2])
            elif not name.endswith(".gamma2"):
                hub[name] = value
        found = dinat.checkpoint_filter_fn(hub, model)
        wanted = model.state_dict()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            expected = torch.full_like(value, 2) if name.endswith("gamma2") else value
            assert torch.equal(found[name], expected), name

    def test_bias_tables_follow_the_kernel(self):
        small = timm.create_model("dinat_mini")
        large = timm.create_model("dinat_mini", kernel_size=11)
        weights = dinat.checkpoint_filter_fn(small.state_dict(), large)
        large.load_state_dict(weights, strict=True)
        table = small.state_dict()["stages.0.blocks.1.attn.rpb"]
        wanted = F.interpolate(table[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
        torch.testing.assert_close(large.state_dict()["stages.0.blocks.1.attn.rpb"], wanted)


class TestArchitecture:
    def test_dilation_one_is_nat(self):
        nat = build("nat_mini")
        dilated = bare("dinat_mini", dilations=[[1] * 3, [1] * 4, [1] * 6, [1] * 5])
        dilated.load_state_dict(nat.state_dict(), strict=True)
        x = image((64, 96))
        torch.testing.assert_close(dilated(x), nat(x))

    def test_small_maps_are_padded_before_the_projection(self):
        """Padding takes part as keys: its projections equal the bias of qkv, and the border lies behind it."""
        torch.manual_seed(0)
        attention = dinat.NeighborhoodAttention(16, 2, kernel_size=7, dilation=2)
        torch.nn.init.normal_(attention.qkv.bias)
        torch.nn.init.normal_(attention.rpb)
        x = torch.randn(2, 10, 13, 16)
        padded = attention(F.pad(x, (0, 0, 0, 1, 0, 4)))
        torch.testing.assert_close(attention(x), padded[:, :10, :13])

    @pytest.mark.long
    def test_detector_dilations_on_a_480x640_image(self):
        """Level 1 is 120 x 160, below kernel x dilation = 7 x 28 = 196, so its dilated block is padded to 196 x 196."""
        dilations = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
        model = build("dinat_mini", features_only=True, norm_outputs=True, dilations=dilations)
        with torch.no_grad():
            shapes = [tuple(x.shape[1:]) for x in model(image((480, 640)))]
        assert shapes == [(64, 120, 160), (128, 60, 80), (256, 30, 40), (512, 15, 20)]

    def test_output_maps_are_normalised_copies(self):
        """The next stage reads the map before its norm."""
        model = build("dinat_mini", num_classes=0, norm_outputs=True)
        plain = bare("dinat_mini", num_classes=0)
        plain.load_state_dict(model.state_dict(), strict=False)
        x = image((64, 64))
        for i, (normed, raw) in enumerate(
            zip(
                model.forward_intermediates(x, intermediates_only=True),
                plain.forward_intermediates(x, intermediates_only=True),
            )
        ):
            norm = getattr(model, f"norm{i}")
            torch.testing.assert_close(normed, norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def test_layer_scale(self):
        assert "stages.0.blocks.0.gamma1" in timm.create_model("nat_small", device="meta").state_dict()
        assert "stages.0.blocks.0.gamma1" not in timm.create_model("dinat_small", device="meta").state_dict()

    def test_wrong_dilations(self):
        with pytest.raises(InputError, match=r"\[3, 4, 6, 5\] per stage, got \[3, 4, 6, 4\]"):
            timm.create_model("dinat_mini", dilations=[[1] * 3, [1] * 4, [1] * 6, [1] * 4])

    def test_translation(self):
        """Away from the borders, a shift by the total stride shifts the features by one cell."""
        model = build("nat_mini", depths=(1, 1), num_heads=(2, 4)).double()
        x = image((160, 160)).double()
        with torch.no_grad():
            here = model.forward_intermediates(x, intermediates_only=True)[-1]
            there = model.forward_intermediates(x.roll((8, 16), (2, 3)), intermediates_only=True)[-1]
        torch.testing.assert_close(there[:, :, 9:11, 10:12], here[:, :, 8:10, 8:10], rtol=1e-10, atol=1e-10)

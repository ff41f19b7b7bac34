"""RaftMLP: the contract, official weights, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, packs
from support.seeded import bare, build, image
from torch import nn

from terrazzo.backbones import raftmlp
from terrazzo.errors import InputError


class TestRaftMLP(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds in G are for embeddings as one convolution."""

    representatives = ("raftmlp_s",)
    operators_of = "s2aformer"
    untrained = ("raftmlp_s", "raftmlp_m", "raftmlp_l")
    shallow = {"raftmlp_s": dict(depths=(1,), dims=(32,), patch_sizes=(4,), img_size=64)}
    costs = {
        "raftmlp_s": (9_868_768, 2.0260),
        "raftmlp_m": (21_413_632, 4.1373),
        "raftmlp_l": (36_184_672, 6.3706),
    }


TWO = dict(depths=(1, 1), dims=(8, 16), patch_sizes=(4, 2), img_size=64)
PLAIN = ((4,), (2,), (2,), (2,))  # kernels of the ablation without the multi-scale embedding
ISOTROPIC = dict(patch_sizes=(16,), kernels=((16,),))
# Settings of the authors: parameters, multiply-adds in G of linear layers at 224 as they count them, entries.
OFFICIAL = {
    "S": (dict(), 9_868_768, 2.0870, 228),
    "M": (dict(dims=(96, 192, 384, 768)), 21_413_632, 4.2673, 228),
    "L": (dict(dims=(128, 192, 512, 1024)), 36_184_672, 6.5440, 228),
    "M, mixer embedding": (dict(dims=(96, 192, 384, 768), kernels=PLAIN), 19_920_640, 3.7471, 228),
    "12": (dict(depths=(12,), dims=(768,), rafts=4, **ISOTROPIC), 58_390_696, 12.0237, 222),
    "36": (dict(depths=(36,), dims=(384,), rafts=2, **ISOTROPIC), 43_532_296, 8.9887, 654),
    "12, r = 1": (dict(depths=(12,), dims=(768,), rafts=1, **ISOTROPIC), 58_105_432, 11.417, 222),
    "12, r = 2": (dict(depths=(12,), dims=(768,), rafts=2, **ISOTROPIC), 58_162_888, 11.619, 222),
    "12, r = 2, cross": (
        dict(depths=(12,), dims=(768,), rafts=2, patch_sizes=(16,), kernels=((16, 32),)),
        60_522_184,
        12.082,
        222,
    ),
}
PACKS = {
    "s": {},
    "s.sizes": {},
    "s.det": dict(num_classes=0, stride4="embed"),
    "12_r4": OFFICIAL["12"][0],
}
SLOW = {"12_r4": [pytest.mark.slow]}  # 58 million parameters in float64
PATHS = [pytest.param(path, id=path.stem, marks=SLOW.get(path.stem, [])) for path in packs("raftmlp")]


class TestOfficial:
    @pytest.mark.parametrize("path", PATHS)
    def test_golden(self, path):
        pack, dense = Pack(path), path.stem == "s.det"
        model = bare("raftmlp_s", **PACKS[path.stem]).double()
        if dense:
            model.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = raftmlp.checkpoint_filter_fn({"state_dict": pack.weights()}, model)
        model.load_state_dict(weights, strict=True)
        for case in pack.meta["cases"]:
            x = pack.image(case)
            with torch.no_grad():
                for i, found in enumerate(model.forward_intermediates(x, intermediates_only=True)):
                    assert list(found.shape) == case["stages"][i]["shape"]
                    ours, official = pack.sample(case, i, found)
                    torch.testing.assert_close(ours, official, rtol=0, atol=1e-8)
                if not dense:
                    torch.testing.assert_close(model(x), pack.logits(case), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", OFFICIAL)
    def test_counts(self, name):
        """Parameters, entries, and multiply-adds with patches of all sizes as separate inputs of a linear layer."""
        arguments, parameters, gmacs, entries = OFFICIAL[name]
        model = timm.create_model("raftmlp_s", device="meta", **arguments)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(model.state_dict()) == entries
        total, macs = 224, model.head.fc.weight.numel()
        for stage, embedding in zip(model.stages, embeddings(model)):
            total //= embedding.stride
            macs += total**2 * embedding.proj.weight.numel()
            for block in stage.blocks:
                macs += sum(layer.weight.numel() for layer in (block.mlp.fc1, block.mlp.fc2)) * total**2
                rafts = block.norm.weight.numel() // block.mix_h.rafts
                for mix in (block.mix_h, block.mix_w):
                    macs += (mix.fc1.weight.numel() + mix.fc2.weight.numel()) * total * rafts
        assert macs / 1e9 == pytest.approx(gmacs, abs=6e-4)

    def test_own_names_pass(self):
        """A checkpoint with our names passes the filter unchanged; the model's names contain nothing official."""
        model = build("raftmlp_s", **TWO)
        found = raftmlp.checkpoint_filter_fn(model.state_dict(), model)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def embeddings(model):
    return [model.stem, *(stage.downsample for stage in model.stages[1:])]


def lively(module):
    torch.manual_seed(0)
    for value in module.parameters():
        nn.init.normal_(value, 0, 0.5)
    return module.double().eval()


class TestArchitecture:
    def test_embedding_is_a_convolution(self):
        """One convolution with added weights equals patches and a linear layer, for every level of S."""
        for i, embedding in enumerate(embeddings(timm.create_model("raftmlp_s").double())):
            x = torch.randn(1, (3, 64, 128, 256)[i], 8, 12, dtype=torch.float64)
            given = x if i == 0 else x.permute(0, 2, 3, 1)
            with torch.no_grad():
                found = embedding(given)
                hook = embedding.proj.register_forward_hook(lambda *_: None)
                wanted = embedding(given)
                hook.remove()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    def test_order_of_patches(self):
        """Patches of all sizes in the order of kernels, each by channel, row and column; zeros surround the map."""
        embedding = lively(raftmlp.Embedding(3, 5, 2, (2, 4)))
        x = image((6, 8)).double()
        padded = F.pad(x, (1, 1, 1, 1))
        small, large = x[0, :, 2:4, 4:6], padded[0, :, 2:6, 4:8]
        wanted = embedding.proj(torch.cat([small.flatten(), large.flatten()]))
        torch.testing.assert_close(embedding(x)[0, 1, 2], wanted)

    @pytest.mark.parametrize("rafts", [1, 2, 3])
    @pytest.mark.parametrize("vertical", [True, False])
    def test_mixing_by_its_definition(self, vertical, rafts):
        height, width, channels = 4, 5, 6
        mixing = lively(raftmlp.RaftMixing(channels, height if vertical else width, rafts, vertical, 0.0))
        x = torch.randn(2, height, width, channels, dtype=torch.float64)
        normed, wanted = mixing.norm(x), x.clone()
        shape = (channels // rafts, height, width)
        for b in range(2):
            for o in range(shape[0]):
                chosen = [a * shape[0] + o for a in range(rafts)]
                for line in range(width if vertical else height):
                    at = (slice(None), line) if vertical else (line, slice(None))
                    vector = torch.cat([normed[b][at][:, c] for c in chosen])  # the raft's channels, then positions
                    mixed = mixing.fc2(F.gelu(mixing.fc1(vector))).chunk(rafts)
                    for c, part in zip(chosen, mixed):
                        wanted[b][at][:, c] += part
        torch.testing.assert_close(mixing(x), wanted)

    def test_by_hand(self):
        """C = 2, r = 2, two rows: the vertical MLP takes (channel 0 row 0, channel 0 row 1, channel 1 row 0, ...)."""
        mixing = raftmlp.RaftMixing(2, 2, 2, True, 0.0)
        mixing.norm = nn.Identity()
        seen = []
        mixing.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        mixing(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).view(1, 2, 1, 2))
        assert seen[0].flatten().tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize("rafts", [1, 2])
    def test_order_of_the_norms_weights(self, rafts):
        """The official norm before raft-token-mixing reads (o, a), and a map has (a, o); they agree for r = 1."""
        model = timm.create_model(
            "raftmlp_s", depths=(1,), dims=(6,), patch_sizes=(4,), kernels=((4,),), rafts=rafts, img_size=16
        )
        official = {f"levels.0.fn.2.1.norm.1.{kind}": torch.arange(6.0) for kind in ("weight", "bias")}
        found = raftmlp.checkpoint_filter_fn.__wrapped__(official, model)
        wanted = [0, 1, 2, 3, 4, 5] if rafts == 1 else [0, 2, 4, 1, 3, 5]
        assert found["stages.0.blocks.0.mix_h.norm.weight"].tolist() == wanted
        assert found["stages.0.blocks.0.mix_h.norm.bias"].tolist() == wanted
        plain = raftmlp.checkpoint_filter_fn.__wrapped__({"levels.0.fn.2.5.norm.weight": torch.arange(6.0)}, model)
        assert plain["stages.0.blocks.0.norm.weight"].tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("size", [(64, 64), (72, 50)])
    def test_level_without_mlps(self, size):
        """A level returns its embedding at its size, and at other sizes the embedding after a round trip a block."""
        model = build("raftmlp_s", depths=(3,), dims=(8,), patch_sizes=(4,), kernels=((4,),), img_size=64).double()
        for name, value in model.named_parameters():
            if ".fc2." in name:
                nn.init.zeros_(value)
        x = image(size).double()
        with torch.no_grad():
            (found,) = model.forward_intermediates(x, intermediates_only=True)
            wanted = model.stem(x).permute(0, 3, 1, 2)
            if size != (64, 64):
                whole = F.interpolate(x, size=(72, 52), mode="bicubic", align_corners=False)
                torch.testing.assert_close(wanted, F.conv2d(whole, model.stem.kernel(), model.stem.proj.bias, 4))
                for _ in range(3):
                    for side in ((16, 16), tuple(found.shape[2:])):
                        wanted = F.interpolate(wanted, size=side, mode="bicubic", align_corners=False)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if size != (64, 64) else 0)

    def test_both_ways_to_resize(self, monkeypatch):
        x = torch.randn(2, 7, 5, 3, dtype=torch.float64)
        wanted = raftmlp.resize(x, (4, 9))
        monkeypatch.setattr(raftmlp, "is_exporting", lambda: True)
        torch.testing.assert_close(raftmlp.resize(x, (4, 9)), wanted)

    def test_a_graph_of_the_trained_size_does_not_resize(self):
        graph = torch.export.export(build("raftmlp_s", **TWO), (image((64, 64)),), strict=False).graph
        assert not [node for node in graph.nodes if "arange" in str(node.target) or "bicubic" in str(node.target)]

    @pytest.mark.slow  # the contract exports one level
    def test_open_sizes_of_two_levels(self, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        model = build("raftmlp_s", **TWO)
        report = onnx_export.export_onnx(model, image((97, 70)), tmp_path / "model.onnx", dynamic=("batch", "hw"))
        assert report.passed, report

    def test_sizes(self):
        model = build("raftmlp_s", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))
        for size in ((224, 224), (256, 320), (197, 231)):
            sides, shapes = size, []
            for p in (4, 2, 2, 2):
                sides = tuple(-(-side // p) for side in sides)
                shapes.append(sides)
            with torch.no_grad():
                maps = model.forward_intermediates(image(size), intermediates_only=True)
            assert [tuple(found.shape[2:]) for found in maps] == shapes

    def test_map_of_stride_4(self):
        """The authors' detectors take the embedding of the first level; it changes no other map and no logits."""
        model = build("raftmlp_s", **TWO)
        other = build("raftmlp_s", stride4="embed", **TWO)
        x = image((64, 96))
        with torch.no_grad():
            plain, early = (m.forward_intermediates(x, intermediates_only=True) for m in (model, other))
            assert torch.equal(early[0], model.stem(x).permute(0, 3, 1, 2))
            assert not torch.equal(early[0], plain[0])
            assert torch.equal(early[1], plain[1])
            assert torch.equal(model(x), other(x))

    def test_drop_path_is_constant(self):
        model = timm.create_model("raftmlp_s", drop_path_rate=0.1, device="meta")
        rates = [part.drop_prob for part in model.modules() if isinstance(part, timm.layers.DropPath)]
        assert rates == [0.1] * 36

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (dict(stride4="first"), "stride4 must be 'level' or 'embed', got 'first'"),
            (dict(depths=(2, 2)), "2 depths, 4 dims, 4 patch_sizes, 4 kernels"),
            (dict(patch_sizes=(4, 4, 2, 2)), "patch sizes after the first must be 2"),
            (dict(rafts=3), r"multiples of rafts, .* got \(64, 128, 256, 512\) and 3"),
            (dict(kernels=((4, 7), (2,), (2,), (2,))), r"at least the patch size 4, by an even number, got \(4, 7\)"),
        ],
    )
    def test_wrong_arguments(self, arguments, error):
        with pytest.raises(InputError, match=error):
            timm.create_model("raftmlp_s", device="meta", **arguments)

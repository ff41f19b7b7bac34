"""MedMamba: the contract, official weights, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare

from terrazzo.backbones import medmamba
from terrazzo.backbones._layers import on_maps
from terrazzo.errors import InputError
from terrazzo.kernels.dispatch.operator import find
from terrazzo.tools.inspect.trace import trace


class TestMedMamba(BackboneContract):
    """Parameters are counted in the authors' class. Multiply-adds: nine per step, channel and state of a scan."""

    operators_of = "vmamba"
    representatives = ("medmamba_t",)
    costs = {
        "medmamba_t": (15_221_608, 2.979),
        "medmamba_s": (19_389_544, 3.946),
        "medmamba_s_paper": (23_557_480, 4.912),
        "medmamba_b": (40_883_688, 8.129),
        "medmamba_b_paper": (48_144_872, 9.751),
    }
    shallow = {name: dict(depths=(1, 1)) for name in costs} | {"medmamba_t": dict(depths=(1,))}


# With 6 classes: parameters; multiply-adds in G at 224 of convolutions and linear layers, as the paper counts; and of
# the scans. The paper states 14.5 M and 2.0 G, 22.8 M and 3.5 G, 47.1 M and 7.4 G.
PUBLISHED = {
    "medmamba_t": (14_457_222, 2.006, 0.737),
    "medmamba_s": (18_625_158, 2.731, 0.910),
    "medmamba_s_paper": (22_793_094, 3.456, 1.084),
    "medmamba_b": (39_864_838, 6.130, 1.445),
    "medmamba_b_paper": (47_126_022, 7.419, 1.676),
}


def projections(model):
    """The multiply-adds in G at 224 of the scans' projections, which are not modules."""
    total = 0
    for info, stage in zip(model.feature_info, model.stages):
        pixels = (224 // info["reduction"]) ** 2
        mixers = [block.op for block in stage.blocks]
        total += sum(pixels * (x.x_proj_weight.numel() + x.dt_projs_weight.numel()) for x in mixers)
    return total / 1e9


class TestOfficial:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_sizes(self, name):
        parameters, modules, scans = PUBLISHED[name]
        model = timm.create_model(name, num_classes=6, device="meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        calls = trace(model, 224)
        scanned = sum(x.flops for x in calls if find(x.function)) / 2e9
        assert scanned == pytest.approx(scans, abs=6e-4)
        assert sum(x.flops for x in calls) / 2e9 - scanned - projections(model) == pytest.approx(modules, abs=6e-4)

    @pytest.mark.parametrize("path", packs("medmamba"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        model = bare(f"medmamba_{pack.meta['variant']}", num_classes=pack.meta["num_classes"])
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = medmamba.checkpoint_filter_fn(pack.weights(), model)
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        assert not counters.keys() & weights.keys()
        model.load_state_dict(weights | counters, strict=True)
        for case in pack.meta["cases"]:
            with torch.no_grad():
                out, maps = model.forward_intermediates(pack.image(case).float())
                pairs = [pack.sample(case, i, found) for i, found in enumerate(maps)]
                for ours, official in (*pairs, (model.forward_head(out), pack.logits(case))):
                    atol = 1e-4 * official.double().std().item()
                    torch.testing.assert_close(ours.double(), official.double(), rtol=0, atol=atol)
                assert [list(found.shape) for found in maps] == [stage["shape"] for stage in case["stages"]]

    @pytest.mark.long
    def test_another_depth_is_refused_by_name(self):
        """The paper's S has 12 blocks in the third stage, the authors' script builds 8; B differs, too."""
        for of, into in (
            ("medmamba_s_paper", "medmamba_s"),
            ("medmamba_s", "medmamba_t"),
            ("medmamba_b_paper", "medmamba_b"),
            ("medmamba_b", "medmamba_s_paper"),
        ):
            weights = timm.create_model(of, device="meta").state_dict()
            with pytest.raises(InputError, match=f"blocks in the third stage, the model .*: build {of}$") as error:
                medmamba.checkpoint_filter_fn(weights, timm.create_model(into, device="meta"))
            assert "\n" not in str(error.value)
            model = timm.create_model(of, num_classes=6, device="meta")
            assert medmamba.checkpoint_filter_fn(weights, model).keys() == model.state_dict().keys()

    def test_a_depth_of_nobody(self):
        weights = timm.create_model("medmamba_t", depths=(2, 2, 5, 2), device="meta").state_dict()
        with pytest.raises(
            InputError, match="5 blocks in the third stage, the model 96 and 4: build a model of this shape"
        ):
            medmamba.checkpoint_filter_fn(weights, timm.create_model("medmamba_t", device="meta"))

    def test_weights_are_not_fetched(self):
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model("medmamba_t", pretrained=True)


class TestArchitecture:
    def test_shuffle(self):
        """Channels 2i come from the convolutions, 2i + 1 from SS2D: halves [1, 2] and [3, 4] give [1, 3, 2, 4]."""
        block = medmamba.SSConvSSMBlock(4, 1, 0.0).eval()
        block.conv = torch.nn.Sequential(Constant(torch.tensor([1.0, 2.0])[:, None, None]))
        block.op = Constant(torch.tensor([3.0, 4.0]))
        x = torch.randn(1, 3, 5, 4)
        torch.testing.assert_close(block(x) - x, torch.tensor([1.0, 3, 2, 4]).expand_as(x))

    def test_zero_weights_are_the_identity(self):
        block = medmamba.SSConvSSMBlock(8, 2, 0.0).eval()
        x = torch.randn(1, 3, 5, 8)
        with torch.no_grad():
            assert not torch.allclose(block(x), x)
            block.op.proj_out.weight.zero_()
            for layer in block.conv:
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.zero_()
                    layer.bias.zero_()
            assert torch.equal(block(x), x)

    def test_only_the_scans_are_dropped(self):
        block = medmamba.SSConvSSMBlock(8, 2, 1.0).train()  # every scan is dropped
        x = torch.randn(2, 3, 5, 8)
        with torch.no_grad():
            update = block(x) - x
            assert not update[..., 1::2].any()
            torch.testing.assert_close(update[..., ::2], on_maps(x[..., :4], *block.conv))

    def test_halves(self):
        """Only the first half of the channels passes the convolutions, and their result is not negative."""
        torch.manual_seed(0)
        block = medmamba.SSConvSSMBlock(8, 2, 0.0).eval()
        x = torch.randn(1, 3, 5, 8)
        other = x.clone()
        other[..., :4] = torch.randn(1, 3, 5, 4)
        with torch.no_grad():
            update, changed = block(x) - x, block(other) - other
        assert not torch.allclose(update[..., ::2], changed[..., ::2])
        torch.testing.assert_close(update[..., 1::2], changed[..., 1::2])
        assert update[..., ::2].min() > -1e-6

    def test_padding_where_the_authors_drop(self):
        """If sizes are not multiples of 32, images are zero-padded to whole patches, and maps to whole pixels."""
        model = timm.create_model("medmamba_t", depths=(1, 1)).eval()
        x = image((62, 61))
        with torch.no_grad():
            torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2))))
            merging = model.stages[1].downsample
            y = torch.randn(1, 5, 7, 96)
            torch.testing.assert_close(merging(y), merging(F.pad(y, (0, 0, 0, 1, 0, 1))))

    def test_head_takes_the_map_without_a_norm(self):
        model = timm.create_model("medmamba_t", depths=(1, 1)).eval()
        x = image((64, 64))
        with torch.no_grad():
            out, maps = model.forward_intermediates(x)
            torch.testing.assert_close(out.permute(0, 3, 1, 2), maps[-1])
            torch.testing.assert_close(model(x), model.head.fc(maps[-1].mean((2, 3))))


@pytest.mark.slow
def test_onnx_of_the_whole_model(tmp_path):
    onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
    report = onnx_export.export_onnx(
        build("medmamba_t"), image((97, 70)), tmp_path / "model.onnx", dynamic=("batch", "hw")
    )
    assert report.passed, report
    assert report.worst <= 1e-4


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value.expand_as(x)

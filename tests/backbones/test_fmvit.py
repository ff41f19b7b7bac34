"""FMViT: the contract, both forms, and the published sizes."""

import copy

import pytest
import timm
import torch
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare
from torch import nn

import terrazzo
from terrazzo.backbones import fmvit
from terrazzo.errors import InputError, WeightsError
from terrazzo.tools.export.targets import exportable_of
from terrazzo.tools.inspect.trace import trace


class TestFMViT(BackboneContract):
    """Parameters and multiply-adds are counted in the form for training; `FORMS` has both forms."""

    representatives = ("fmvit_tiny",)
    reconstructed = True
    operators_of = "s2aformer"
    shallow = {"fmvit_tiny": dict(dims=(32, 64), depths=(1, 2), deploy=True)}  # the form that is exported
    costs = {
        "fmvit_tiny": (3_073_304, 0.467),
        "fmvit_small": (10_173_928, 1.142),
        "fmvit_medium": (20_812_808, 3.069),
        "fmvit_base": (39_909_320, 6.505),
        "fmvit_large": (58_486_824, 11.217),
    }


# For inference: parameters, multiply-adds at 224 in G, and the published figures in M and G (arXiv 2311.05707).
FORMS = {
    "fmvit_tiny": (2_012_184, 0.3360, 2.0, 0.3),
    "fmvit_small": (6_384_504, 0.7914, 6.4, 0.8),
    "fmvit_medium": (12_843_720, 2.0284, 12.8, 2.0),
    "fmvit_base": (24_264_392, 4.1862, 24.3, 4.2),
    "fmvit_large": (35_335_080, 7.0738, 35.3, 7.1),
}
SMALL = dict(dims=(32, 64, 96), depths=(1, 2, 2), num_classes=5)


def lively(name="fmvit_tiny", **options):
    """A model in float64 whose norms have statistics and parameters that matter."""
    model = build(name, **{**SMALL, **options}).double()
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for x in (norm.running_mean, norm.bias.data):
                x.copy_(0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
            for x in (norm.running_var, norm.weight.data):
                x.copy_(1 + 0.2 * torch.rand(x.shape, generator=generator, dtype=x.dtype))
    return model


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_published_sizes(self, name):
        """Every published digit is that of the form for inference."""
        parameters, gmacs, published, published_gmacs = FORMS[name]
        model = timm.create_model(name, deploy=True, device="meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert round(parameters / 1e6, 1) == published
        assert round(gmacs, 1) == published_gmacs
        if name == "fmvit_tiny":
            found = sum(x.flops for x in trace(timm.create_model(name, deploy=True), (224, 224))) / 2e9
            assert found == pytest.approx(gmacs, abs=5e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(96, 96), (72, 104), (67, 97)])
    def test_same_outputs(self, size):
        model = lively(norm_outputs=True)
        x = image(size, batch=2).double()
        wanted, maps = model.forward_intermediates(x)
        deployed = terrazzo.reparameterize(copy.deepcopy(model))
        found, own = deployed.forward_intermediates(x)
        for a, b in zip((found, *own), (wanted, *maps)):
            assert (a - b).abs().max() < 1e-12 * b.abs().max()

    @torch.no_grad()
    def test_same_outputs_in_float32(self):
        model = lively().float()
        x = image((96, 96), batch=2)
        wanted = model(x)
        assert (terrazzo.reparameterize(model)(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()

    @torch.no_grad()
    def test_names_and_repetition(self):
        """`deploy=True` has the names of a reparameterised model, and a second call changes nothing."""
        model, x = lively(), image((64, 64)).double()
        whole = model.state_dict()
        deployed = terrazzo.reparameterize(model)
        assert deployed is model
        wanted, names = model(x), model.state_dict()
        assert terrazzo.reparameterize(model).state_dict().keys() == names.keys()
        assert torch.equal(model(x), wanted)
        built = timm.create_model("fmvit_tiny", deploy=True, **SMALL).double().eval()
        built.load_state_dict(names)
        assert torch.equal(built(x), wanted)
        with pytest.raises(WeightsError, match=r"the form for inference: create .* deploy=True"):
            timm.create_model("fmvit_tiny", **SMALL).load_state_dict(names)
        with pytest.raises(WeightsError, match=r"the form for training: .* terrazzo\.reparameterize\(model\)"):
            built.load_state_dict(whole)

    def test_training_mode_is_refused(self):
        model = timm.create_model("fmvit_tiny", **SMALL).train()
        names = list(model.state_dict())
        with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
            terrazzo.reparameterize(model)
        with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
            model.stages[0].blocks[0].ffn.reparameterize()
        assert list(model.state_dict()) == names

    def test_exports_have_the_form_for_inference(self):
        ready = exportable_of("fmvit_tiny", None, False, None, (64, 64), False, None, {})
        assert sum(p.numel() for p in ready.module.parameters()) == FORMS["fmvit_tiny"][0]

    @torch.no_grad()
    def test_hand_cases(self):
        """A layer with 1 and 2 groups and the identity; and a factor and a summand in front of a layer."""
        layer = fmvit.GroupedMlp(2, 2, groups=(1, 2)).double().eval()
        for branch, weight in zip(layer.branches, ([[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0]])):
            branch.conv.weight.copy_(torch.tensor(weight)[..., None, None])
            branch.bn.eps = 0
        layer.identity.eps = 0
        layer.reparameterize()
        assert layer.conv.weight.flatten(1).tolist() == [[7, 2], [3, 11]]
        layer = fmvit.GroupedMlp(1, 1, groups=(1,), dtype=torch.float64).eval()
        layer.identity = None
        layer.branches[0].conv.weight.fill_(2)
        layer.branches[0].bn.bias.fill_(1)
        layer.branches[0].bn.eps = 0
        layer.reparameterize((torch.tensor([3.0]).double(), torch.tensor([4.0]).double()))
        assert (layer.conv.weight.item(), layer.conv.bias.item()) == (6, 9)


class TestArchitecture:
    @pytest.mark.parametrize("path", packs("fmvit"), ids=lambda path: path.stem)
    @torch.no_grad()
    def test_golden(self, path):
        """A reconstruction from the same description, in float64, and its form for inference."""
        pack = Pack(path)
        model = bare(path.stem).double()
        weights = fmvit.checkpoint_filter_fn(pack.weights(), model)
        model.load_state_dict(weights, strict=True)
        for deployed in (False, True):
            model = terrazzo.reparameterize(model) if deployed else model
            for case in pack.meta["cases"]:
                out, maps = model.forward_intermediates(pack.image(case))
                wanted = pack.logits(case)
                torch.testing.assert_close(model.forward_head(out), wanted, rtol=0, atol=1e-8 * wanted.std().item())
                for stage, found in enumerate(maps):
                    ours, theirs = pack.sample(case, stage, found)
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * theirs.std().item())

    def test_every_branch_learns(self):
        model = timm.create_model("fmvit_tiny", drop_path_rate=0.5, **SMALL).train()
        model(image((64, 64), batch=4)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        branches = [layer for layer in model.modules() if isinstance(layer, fmvit.GroupedMlp)]
        assert {len(layer.branches) for layer in branches} == {1, 3}
        assert all(branch.conv.weight.grad.abs().max() > 0 for layer in branches for branch in layer.branches)

    @torch.no_grad()
    def test_attention_reads_averages_of_neighbours(self):
        """The mean is over squares of the map, not over positions in raster order, and a border square is smaller."""
        layer = fmvit.Attention(32, 2).double().eval()
        x = torch.randn(1, 32, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wanted = torch.stack([x[..., i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2, 4)], 2)
        torch.testing.assert_close(layer.pool(x).flatten(2), wanted)

    @pytest.mark.parametrize(("dims", "low"), [(64, 32), (128, 96), (192, 160), (352, 256), (608, 448), (640, 480)])
    def test_channels_of_attention(self, dims, low):
        block = fmvit.FrequencyFusionBlock(dims, dims, 1, 1, 0.0, device="meta")
        assert block.attn.heads * 32 == low

    @pytest.mark.parametrize("dims", [(32, 32), (48, 64), (32, 80)])
    def test_refused_channels(self, dims):
        with pytest.raises(InputError, match="dims must be multiples of 32, from the second on at least 64, got"):
            timm.create_model("fmvit_tiny", dims=dims, depths=(1, 1))

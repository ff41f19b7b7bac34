"""MambaVision: the contract, official weights, and its architecture."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, packs
from support.seeded import bare, build, image
from torch import nn

from terrazzo.backbones import mambavision
from terrazzo.backbones.mambavision import Kept
from terrazzo.errors import InputError
from terrazzo.tools.inspect.measure import measure


class TestMambaVision(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds in G: convolutions, linear layers and attention."""

    operators_of = "vmamba"
    representatives = ("mambavision_t",)
    shallow = {"mambavision_t": dict(depths=(1, 1, 2), dim=32, num_heads=(4, 8))}
    costs = {
        "mambavision_t": (31_794_248, 4.565),
        "mambavision_t2": (35_104_008, 5.235),
        "mambavision_s": (50_140_584, 7.578),
        "mambavision_b": (97_685_288, 15.162),
        "mambavision_l": (227_961_048, 35.160),
        "mambavision_l2": (241_554_824, 37.880),
        "mambavision_l2_512": (241_554_824, 206.2),
    }


def golden_model(pack: Pack) -> nn.Module:
    """The model of a pack, with its weights; the dense flavour has the detection windows of the T variant."""
    dense = pack.meta["variant"].startswith("det_")
    arguments = dict(num_classes=0, norm_outputs=True, window_size=(112, 56)) if dense else {}
    model = bare("mambavision_t", **arguments)
    assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
    weights = mambavision.checkpoint_filter_fn({"state_dict": pack.weights()}, model)
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert not counters.keys() & weights.keys()
    model.load_state_dict(weights | counters, strict=True)
    return model


def lively(model: nn.Module) -> nn.Module:
    """Set parameters so that states decay within a step or within hundreds of steps."""
    with torch.no_grad():
        for mixer in model.modules():
            if isinstance(mixer, mambavision.MambaVisionMixer):
                nn.init.uniform_(mixer.dt_proj.bias, -2.5, 0.5)
                nn.init.normal_(mixer.A_log)
                nn.init.normal_(mixer.dt_proj.weight, std=0.5)
                nn.init.normal_(mixer.x_proj.weight, std=0.1)
                nn.init.normal_(mixer.proj_out.weight, std=0.1)
                nn.init.normal_(mixer.in_proj.weight, std=0.1)
    return model


class TestOfficial:
    # The dense flavour is slow, because nearly all of it is padding: 12544 positions attend, 560 lie on the map.
    @pytest.mark.parametrize(
        "path",
        [pytest.param(path, marks=pytest.mark.slow if "det" in path.stem else ()) for path in packs("mambavision")],
        ids=lambda path: path.stem,
    )
    def test_golden(self, path):
        pack = Pack(path)
        model = golden_model(pack)
        for case in pack.meta["cases"]:
            x = pack.image(case).float()
            with torch.no_grad():
                for i, found in enumerate(model.forward_intermediates(x, intermediates_only=True)):
                    stage = case["stages"][i]
                    assert list(found.shape) == stage["shape"]
                    ours, official = pack.sample(case, i, found)
                    torch.testing.assert_close(ours, official.float(), rtol=0, atol=1e-4 * stage["std"])
                if "logits_std" in case:
                    limit = 1e-4 * case["logits_std"]
                    torch.testing.assert_close(model(x), pack.logits(case).float(), rtol=0, atol=limit)

    @pytest.fixture(scope="class")
    def official(self):
        return Pack(next(path for path in packs("mambavision") if path.stem == "T")).weights()

    @pytest.mark.parametrize("prefix", ["backbone.", "model.", "module.", "encoder."])
    def test_prefixes(self, prefix, official):
        """Files of detectors, the hub's safetensors, parallel runs and larger networks load strictly."""
        weights = {prefix + name: value for name, value in official.items()}
        if prefix in ("backbone.", "encoder."):
            weights["rpn_head.conv.weight"] = torch.zeros(1)
        model = timm.create_model("mambavision_t", device="meta")
        found = mambavision.checkpoint_filter_fn({"state_dict": weights}, model)
        wanted = {key: value.shape for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
        assert {key: value.shape for key, value in found.items()} == wanted

    def test_licence_is_said(self, caplog):
        """The authors' names log the licence. Our names do not, because our own checkpoints have our licence."""
        model = timm.create_model("mambavision_t", device="meta")
        assert mambavision.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
        assert not caplog.records
        names = [name for name, *_ in Pack(packs("mambavision")[0]).meta["state"]]
        with caplog.at_level(logging.WARNING):
            mambavision.checkpoint_filter_fn({name: torch.zeros(0) for name in names}, model)
        (record,) = caplog.records
        assert "CC-BY-NC-SA-4.0: no commercial use" in record.getMessage()
        for name in TestMambaVision.costs:
            assert timm.models.get_pretrained_cfg(name).license == "cc-by-nc-sa-4.0"

    def test_parameters_of_the_dense_and_the_largest(self):
        dense = timm.create_model("mambavision_t", num_classes=0, norm_outputs=True, device="meta")
        assert sum(p.numel() for p in dense.parameters()) == 31_154_368
        largest = dict(depths=(3, 3, 20, 10), dim=256)
        model = timm.create_model("mambavision_l2", **largest, window_size=(16, 8), device="meta")
        assert sum(p.numel() for p in model.parameters()) == 739_570_472


SMALL = dict(depths=(1, 1, 2, 2), dim=32, num_heads=(4, 8))


def by_hand(mixer: mambavision.MambaVisionMixer, x: torch.Tensor) -> torch.Tensor:
    """The mixer on (B, L, C) as the paper's code defines it, step by step."""
    x, z = mixer.in_proj(x).transpose(1, 2).chunk(2, 1)
    x, z = F.silu(mixer.conv1d_x(x)), F.silu(mixer.conv1d_z(z))
    dt, B, C = mixer.x_proj(x.transpose(1, 2)).split([mixer.dt_proj.in_features, 8, 8], -1)
    dt = F.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias)
    state, out = 0, []
    for t in range(x.shape[2]):
        decay = torch.exp(dt[:, t, :, None] * -torch.exp(mixer.A_log))
        state = decay * state + (dt[:, t] * x[:, :, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1) + mixer.D * x[:, :, t])
    return mixer.proj_out(torch.cat([torch.stack(out, 1), z.transpose(1, 2)], -1))


class TestArchitecture:
    @pytest.mark.parametrize(
        ("depth", "attending"), [(1, []), (2, [1]), (3, [2]), (4, [2, 3]), (5, [3, 4]), (7, [4, 5, 6])]
    )
    def test_later_half_attends(self, depth, attending):
        model = timm.create_model("mambavision_t", depths=(1, 1, depth, 1), device="meta")
        blocks = model.stages[2].blocks
        assert [i for i, block in enumerate(blocks) if isinstance(block.mixer, mambavision.Attention)] == attending

    @pytest.mark.long
    def test_mixer(self):
        torch.manual_seed(0)
        mixer = lively(nn.ModuleList([mambavision.MambaVisionMixer(32)])).double()[0]
        x = torch.randn(2, 3, 5, 32, dtype=torch.double)
        with torch.no_grad():
            found = mixer(x, Kept(height=3, width=5))
            torch.testing.assert_close(found.flatten(1, 2), by_hand(mixer, x.flatten(1, 2)), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(mixer(x, Kept(height=2, width=4)), found[:, :2, :4])

    @pytest.mark.long
    def test_mixers_look_one_position_ahead(self):
        torch.manual_seed(0)
        mixer = lively(nn.ModuleList([mambavision.MambaVisionMixer(32)])).double()[0]
        x = torch.randn(1, 4, 4, 32, dtype=torch.double)
        other = x.clone()
        other[0, 2, 1] += 1  # position 9 of 16
        changed = (mixer(x, Kept(height=4, width=4)) != mixer(other, Kept(height=4, width=4))).any(-1).flatten()
        assert changed.nonzero().flatten().tolist() == list(range(8, 16))

    def test_windows_are_apart(self):
        """Each window alone gives the stage's result; this includes padding and order."""
        model = lively(build("mambavision_t", **SMALL, window_size=(4, 3))).double()
        stage = model.stages[2]
        x = torch.randn(2, 64, 18, 22, dtype=torch.double)
        with torch.no_grad():
            found = stage(x)
            padded = F.pad(stage.downsample(x), (0, 1, 0, 3)).permute(0, 2, 3, 1)  # 9 x 11 to 12 x 12
            out = torch.zeros_like(padded)
            for row in range(0, 12, 4):
                for column in range(0, 12, 4):
                    part = (slice(None), slice(row, row + 4), slice(column, column + 4))
                    window = padded[part]
                    for block in stage.blocks:
                        window = block(window, Kept(height=4, width=4))
                    out[part] = window
        torch.testing.assert_close(found, out[:, :9, :11].permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("size", "windows"), [((96, 160), (14, 7)), ((224, 96), (10, 8)), ((97, 70), (4, 3)), ((64, 64), (24, 12))]
    )
    def test_padding_of_the_last_block_is_not_missed(self, size, windows):
        """A stage's last block may skip its padding: in float64, results agree to 1e-10."""
        model = lively(build("mambavision_t", **SMALL, window_size=windows)).double()
        x = image(size).double()
        with torch.no_grad():
            found = model.forward_intermediates(x, intermediates_only=True)
            for stage in model.stages[2:]:
                stage.blocks[-1].last = False
            wanted = model.forward_intermediates(x, intermediates_only=True)
        for ours, plain in zip(found, wanted):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)

    @pytest.mark.long
    def test_gradients_without_the_padding_of_the_last_block(self):
        model = lively(build("mambavision_t", **SMALL, window_size=(8, 5))).double()
        x = image((64, 96)).double()
        found, wanted = [], []
        for gradients in (found, wanted):
            model.zero_grad()
            model(x).square().sum().backward()
            gradients.extend(p.grad.clone() for p in model.parameters())
            model.stages[2].blocks[-1].last = model.stages[3].blocks[-1].last = False
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    @pytest.mark.long
    def test_multiply_adds_of_padding(self):
        """Multiply-adds in G at 224, a detector's windows: last blocks skip or keep padding, or windows are fitted."""
        model = timm.create_model("mambavision_t", window_size=(112, 56), device="meta")
        assert measure(model, 224).macs / 1e9 == pytest.approx(466.5, abs=0.1)
        for stage in model.stages[2:]:
            stage.blocks[-1].last = False
        assert measure(model, 224).macs / 1e9 == pytest.approx(600.8, abs=0.1)
        fitted = timm.create_model("mambavision_t", window_size=(112, 56), fit_windows=True, device="meta")
        assert measure(fitted, 224).macs / 1e9 == pytest.approx(TestMambaVision.costs["mambavision_t"][1], rel=0.01)

    def test_fitted_windows(self):
        """Windows larger than the map shrink to the map; at 224 this equals the classifier's windows."""
        plain, fitted = (
            build("mambavision_t", **SMALL, **windows)
            for windows in ({}, dict(window_size=(112, 56), fit_windows=True))
        )
        x = image((224, 224))
        with torch.no_grad():
            assert torch.equal(plain(x), fitted(x))
            assert [tuple(m.shape[2:]) for m in fitted.forward_intermediates(image((97, 70)), intermediates_only=True)]

    @pytest.mark.parametrize("windows", [(7,), (14, 7, 7, 7), (14, 0)])
    def test_wrong_windows(self, windows):
        with pytest.raises(InputError, match="window_size must be two positive numbers"):
            timm.create_model("mambavision_t", window_size=windows)


def bias_of_dt_once(model):
    for module in model.modules():
        if isinstance(module, mambavision.MambaVisionMixer):
            module.dt_proj.bias.data /= 2


def usual_norm_in_the_stem(model):
    for module in model.stem:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def causal_convolution(model):
    for module in model.modules():
        if isinstance(module, mambavision.MambaVisionMixer):
            for convolution in (module.conv1d_x, module.conv1d_z):
                convolution.weight.data = convolution.weight.data.roll(1, -1)


def fitted_windows(model):
    for stage in model.stages[2:]:
        stage.fit_windows = True


class TestTraps:
    def test_two_gelus(self):
        """GELU is approximate in convolutional blocks and exact in MLPs; a swap changes logits by 1e-4."""
        stages = timm.create_model("mambavision_t", device="meta").stages
        kinds = [{m.approximate for m in stage.modules() if isinstance(m, nn.GELU)} for stage in stages]
        assert kinds == [{"tanh"}, {"tanh"}, {"none"}, {"none"}]

    @pytest.mark.parametrize(
        "mistake",
        [bias_of_dt_once, usual_norm_in_the_stem, causal_convolution, fitted_windows],
        ids=lambda mistake: mistake.__name__,
    )
    def test_mistakes_show(self, mistake):
        """Easy mistakes change the logits by more than ten times the golden packs' tolerance."""
        model = lively(build("mambavision_t", **SMALL))
        for norm in (model.stem[1], model.stem[4]):
            norm.running_var.fill_(1e-2)  # otherwise epsilon would have no effect
        x = image((96, 128))
        with torch.no_grad():
            right = model(x)
            mistake(model)
            assert (model(x) - right).abs().max() > 1e-3 * right.std()


class TestExport:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mambavision_t", "mambavision_s"])
    def test_open_sizes_beyond_the_window(self, name, tmp_path):
        """The graph is traced on maps of one window and runs on maps of many windows."""
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        ort = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
        model = build(name)
        report = onnx_export.export_onnx(model, image((64, 96)), tmp_path / "model.onnx", dynamic=("batch", "hw"))
        assert report.passed, report
        session = ort.InferenceSession(str(tmp_path / "model.onnx"))
        for size in ((97, 70), (224, 224), (320, 448)):
            x = image(size, batch=2)
            with torch.no_grad():
                wanted = model(x)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4 * wanted.std().item())

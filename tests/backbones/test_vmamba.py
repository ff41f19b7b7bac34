"""VMamba and its first version: the contract, official weights, SS2D's definition, and easy mistakes in SS2D."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare

from terrazzo.backbones import _ss2d, vmamba
from terrazzo.kernels.dispatch.operator import find
from terrazzo.tools.inspect.trace import trace


class TestVMamba(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds: nine per step, channel and state of a scan."""

    representatives = ("vmamba_tiny_s1l8",)
    costs = {
        "vmamba_tiny_s1l8": (30_249_064, 4.870),
        "vmamba_tiny_s2l5": (30_705_832, 4.814),
        "vmamba_small_s2l15": (50_147_752, 8.651),
        "vmamba_small_s1l20": (49_012_840, 8.559),
        "vmamba_base_s2l15": (88_557_800, 15.272),
        "vmamba_base_s1l20": (86_614_504, 15.150),
        "vmamba_v0_tiny": (22_893_448, 5.584),
        "vmamba_v0_small": (44_417_416, 11.158),
        "vmamba_v0_base": (76_254_056, 17.921),
    }
    shallow = {name: dict(depths=(1, 1, 1, 1)) for name in costs} | {"vmamba_tiny_s1l8": dict(depths=(1,))}


# The scans' multiply-adds in G at 224.
SCANS = {
    "vmamba_tiny_s1l8": 0.057,
    "vmamba_tiny_s2l5": 0.098,
    "vmamba_small_s2l15": 0.152,
    "vmamba_small_s1l20": 0.089,
    "vmamba_base_s2l15": 0.202,
    "vmamba_base_s1l20": 0.119,
    "vmamba_v0_tiny": 1.907,
    "vmamba_v0_small": 3.468,
    "vmamba_v0_base": 4.624,
}
# The parameters of the authors' detectors' backbones, without a classifier and with a norm for each map.
DENSE = {"vmamba_tiny_s1l8": 29_481_408, "vmamba_small_s2l15": 49_380_096, "vmamba_base_s2l15": 87_534_592}


def official_names(model):
    """The state dict of our classifier, with the names of the authors' current code."""
    stems = {"stem.proj.": 0, "stem.norm.": 2, "stem.proj2.": 5, "stem.norm2.": 7}
    out = {}
    for name, value in model.state_dict().items():
        for ours, index in stems.items():
            name = name.replace(ours, f"patch_embed.{index}.")
        for i in range(1, 4):
            name = name.replace(f"stages.{i}.downsample.", f"layers.{i - 1}.downsample.")
        name = name.replace("stages.", "layers.").replace(".proj_out.", ".out_proj.")
        if isinstance(model.stem, vmamba.Stem):
            name = name.replace("sample.reduction.", "sample.1.").replace("sample.norm.", "sample.3.")
        name = "classifier." + name if name.startswith("norm.") else name
        out[name.replace("head.fc.", "classifier.head.")] = value
    return out


VERSIONS = ("vmamba_tiny_s1l8", "vmamba_v0_tiny")


class TestOfficial:
    @pytest.mark.parametrize("path", packs("vmamba"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        variant = pack.meta["variant"]
        dense = variant.startswith("det_")
        arguments = dict(num_classes=0, norm_outputs=True) if dense else {}
        model = bare(f"vmamba_{variant.removeprefix('det_')}", **arguments)
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = {f"backbone.{name}": value for name, value in pack.weights().items()} if dense else pack.weights()
        checkpoint = {"state_dict" if dense else "model": weights, "epoch": 264}
        model.load_state_dict(vmamba.checkpoint_filter_fn(checkpoint, model), strict=True)
        for case in pack.meta["cases"]:
            x = pack.image(case).float()
            with torch.no_grad():
                out, maps = model.forward_intermediates(x)
                for i, found in enumerate(maps):
                    assert list(found.shape) == case["stages"][i]["shape"]
                    close(*pack.sample(case, i, found))
                if not dense:
                    close(model.forward_head(out), pack.logits(case))

    @pytest.mark.parametrize("name", DENSE)
    def test_dense_parameters(self, name):
        model = timm.create_model(name, num_classes=0, norm_outputs=True, device="meta")
        assert sum(p.numel() for p in model.parameters()) == DENSE[name]

    @pytest.mark.parametrize(
        "name", [x if x in TestVMamba.representatives else pytest.param(x, marks=pytest.mark.slow) for x in SCANS]
    )
    def test_multiply_adds_of_the_scans(self, name):
        calls = [x for x in trace(timm.create_model(name, device="meta"), 224) if find(x.function)]
        assert sum(call.flops for call in calls) / 2e9 == pytest.approx(SCANS[name], abs=6e-4)

    @pytest.mark.parametrize("name", VERSIONS)
    def test_forms_of_the_names_and_weights(self, name):
        """Projections are matrices or 1x1 convolutions; the first version's files have some different names."""
        model = timm.create_model(name, depths=(1, 1, 1, 1))
        wanted = model.state_dict()
        official = official_names(model)
        assert not official.keys() & wanted.keys()
        projections = (".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")
        as_convolutions = {k: v[..., None, None] if k.endswith(projections) else v for k, v in official.items()}
        first = {
            k.replace(".norm.", ".ln_1.", "blocks" in k)
            .replace(".op.", ".self_attention.")
            .replace("patch_embed.0", "patch_embed.proj")
            .replace("patch_embed.2", "patch_embed.norm")
            .replace("classifier.", ""): v
            for k, v in official.items()
        }
        for weights in (official, as_convolutions, first, wanted):
            found = vmamba.checkpoint_filter_fn({"model": weights}, model)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


def close(found, wanted):
    """Compare float32 results, within 1e-4 of the standard deviation."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-4 * wanted.double().std().item())


def lively_mixer(dim, ratio, states, gated):
    """An SS2D in float64 with random values in all parameters."""
    torch.manual_seed(0)
    mixer = _ss2d.SS2D(dim, ratio, states, gated, dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0, 0.5)
    return mixer


def cross_scan(x):
    """(B, D, H, W) to the four sequences (B, D, H W)."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return [rows, columns, rows.flip(2), columns.flip(2)]


def cross_merge(sequences, height, width):
    rows, columns = (sequences[k] + sequences[k + 2].flip(2) for k in (0, 1))
    return rows.unflatten(2, (height, width)) + columns.unflatten(2, (width, height)).transpose(2, 3)


def ss2d(x, mixer):
    """The mixer as in the paper, written out: channels first, and sequences are permuted before the projections."""
    rank, states, _ = mixer.sizes
    x = torch.einsum("bchw,dc->bdhw", x, mixer.in_proj.weight)
    if mixer.gated:
        x, gate = x.chunk(2, 1)
    inner = x.shape[1]
    x = F.silu(F.conv2d(x, mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=inner))
    outs = []
    for k, sequence in enumerate(cross_scan(x)):
        steps, B, C = torch.einsum("bdl,cd->bcl", sequence, mixer.x_proj_weight[k]).split((rank, states, states), 1)
        steps = torch.einsum("brl,dr->bdl", steps, mixer.dt_projs_weight[k]) + mixer.dt_projs_bias[k][:, None]
        steps = F.softplus(steps)
        A = -mixer.A_logs.unflatten(0, (4, -1))[k].exp()
        state, out = 0, []
        for t in range(sequence.shape[2]):
            step = steps[:, :, t, None]
            state = (step * A).exp() * state + step * B[:, None, :, t] * sequence[:, :, t, None]
            out.append((state * C[:, None, :, t]).sum(-1))
        outs.append(torch.stack(out, 2) + mixer.Ds.unflatten(0, (4, -1))[k][:, None] * sequence)
    y = cross_merge(outs, *x.shape[2:]).movedim(1, -1)
    y = F.layer_norm(y, (inner,), mixer.out_norm.weight, mixer.out_norm.bias, 1e-5).movedim(-1, 1)
    return torch.einsum("bdhw,cd->bchw", y * F.silu(gate) if mixer.gated else y, mixer.proj_out.weight)


class TestSS2D:
    @pytest.mark.parametrize(("ratio", "states", "gated"), [(1, 1, False), (2, 1, False), (2, 16, True)])
    def test_is_what_the_paper_says(self, ratio, states, gated):
        mixer = lively_mixer(20, ratio, states, gated)
        x = torch.randn(2, 20, 5, 7, dtype=torch.float64)
        with torch.no_grad():
            found = mixer(x.movedim(1, -1)).movedim(-1, 1)
            torch.testing.assert_close(found, ss2d(x, mixer), rtol=1e-10, atol=1e-10)

    def test_turned_around(self):
        """With equal parameters for all orders and a point-symmetric convolution, a rotated map rotates the result."""
        mixer = lively_mixer(8, 1, 1, False)
        x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
        with torch.no_grad():
            assert not torch.allclose(mixer(x.flip(1, 2)), mixer(x).flip(1, 2), atol=1e-3)
            for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
                parameter = getattr(mixer, name)
                for_each = parameter.view(4, -1)
                for_each.copy_(for_each[:1].clone().expand_as(for_each))
            weight = mixer.conv2d.weight
            weight.copy_(weight + weight.flip(2, 3))
            torch.testing.assert_close(mixer(x.flip(1, 2)), mixer(x).flip(1, 2), rtol=1e-10, atol=1e-10)

    def test_transposed(self):
        """If the orders' parameters are swapped and the convolution is transposed, rows become columns."""
        mixer = lively_mixer(8, 1, 1, False)
        x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
        with torch.no_grad():
            wanted = mixer(x).transpose(1, 2)
            assert not torch.allclose(mixer(x.transpose(1, 2)), wanted, atol=1e-3)
            for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
                for_each = getattr(mixer, name).view(4, -1)
                for_each.copy_(for_each[[1, 0, 3, 2]])
            mixer.conv2d.weight.copy_(mixer.conv2d.weight.transpose(2, 3).clone())
            torch.testing.assert_close(mixer(x.transpose(1, 2)), wanted, rtol=1e-10, atol=1e-10)

    def test_initial_values(self):
        """Steps after softplus are 1e-3 to 1e-1, decays are 1 to N, and the weight of the input is 1."""
        torch.manual_seed(0)
        mixer = timm.create_model("vmamba_v0_tiny", depths=(1, 1)).stages[0].blocks[0].op
        steps = F.softplus(mixer.dt_projs_bias)
        assert 1e-3 < steps.min() < 1.2e-3
        assert 0.08 < steps.max() < 0.1
        torch.testing.assert_close(mixer.A_logs.exp(), torch.arange(1.0, 17).expand(4 * 192, 16))
        assert (mixer.Ds == 1).all()
        assert 0.95 * 6**-0.5 < mixer.dt_projs_weight.abs().max() < 6**-0.5
        assert 0.95 * 192**-0.5 < mixer.x_proj_weight.abs().max() < 192**-0.5

    def test_half_precision_keeps_the_range_of_the_scans(self):
        """The sum of four scans may exceed 65504: the norm gets it without overflow."""
        mixer = lively_mixer(8, 1, 1, False).float()
        with torch.no_grad():
            mixer.Ds.fill_(60000.0)
            x = torch.randn(1, 5, 7, 8)
            wanted = mixer(x)
            assert mixer.half()(x.half()).isfinite().all()
            torch.testing.assert_close(mixer(x.half()).float(), wanted, rtol=0.02, atol=0.02)


class TestTraps:
    """The authors' initial values hide mistakes in the scans; with other values, mistakes must change the logits."""

    @pytest.mark.parametrize("trap", ["no bias of the steps", "no input in the output", "reversed", "reordered"])
    def test_logits_tell(self, trap, monkeypatch):
        torch.manual_seed(0)
        model = timm.create_model("vmamba_tiny_s1l8", depths=(1, 1, 2, 1)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("dt_projs_bias", "A_logs", "Ds")):
                    parameter.normal_()
                if name.endswith(("x_proj_weight", "proj.weight")):
                    parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
        x, scan = image((64, 96)), _ss2d.selective_scan_2d

        def trapped(u, delta, A, B, C, D, delta_bias, **options):
            if trap == "no bias of the steps":
                delta_bias = None
            if trap == "no input in the output":
                D = None
            if trap == "reversed":
                options["orders"] = ("rows_reversed", "columns_reversed", "rows", "columns")
            if trap == "reordered":
                options["orders"] = ("rows", "rows_reversed", "columns", "columns_reversed")
            return scan(u, delta, A, B, C, D, delta_bias, **options)

        with torch.no_grad():
            wanted = model(x)
            monkeypatch.setattr(_ss2d, "selective_scan_2d", trapped)
            assert (model(x) - wanted).norm() > 0.1 * wanted.norm()


class TestArchitecture:
    def test_first_version_at_any_size(self):
        """Patches and merging zero-pad maps that do not divide."""
        model = timm.create_model("vmamba_v0_tiny", depths=(1, 1, 1, 1)).eval()
        x = image((97, 70))
        with torch.no_grad():
            out, maps = model.forward_intermediates(x)
            assert [tuple(y.shape[2:]) for y in maps] == [(25, 18), (13, 9), (7, 5), (4, 3)]
            torch.testing.assert_close(model(F.pad(x, (0, 2, 0, 3))), model.forward_head(out))

    def test_what_the_versions_have(self):
        names = {name: set(timm.create_model(name, device="meta").state_dict()) for name in VERSIONS}
        for part in ("op.conv2d.bias", "norm2.weight", "mlp.fc1.weight"):
            found = [f"stages.0.blocks.0.{part}" in names[name] for name in VERSIONS]
            assert found == ([False, True] if part == "op.conv2d.bias" else [True, False])

    def test_no_weight_decay(self):
        names = timm.create_model("vmamba_tiny_s1l8", depths=(1,), device="meta").no_weight_decay()
        assert names == {f"stages.0.blocks.0.op.{name}" for name in ("A_logs", "Ds", "dt_projs_bias")}


@pytest.mark.slow
def test_onnx_of_the_whole_model(tmp_path):
    onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
    model = build("vmamba_tiny_s1l8")
    report = onnx_export.export_onnx(model, image((97, 70)), tmp_path / "model.onnx", dynamic=("batch", "hw"))
    assert report.passed, report
    assert report.worst <= 1e-4

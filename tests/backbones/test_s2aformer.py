"""S2AFormer: the contract, the published sizes, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract, build, image

from terrazzo.backbones import s2aformer
from terrazzo.backbones._layers import on_maps
from terrazzo.kernels.dispatch.operator import find
from terrazzo.tools.inspect.trace import trace
from terrazzo.tools.runtimes import open_file


class TestS2AFormer(BackboneContract):
    """Multiply-adds here include the two products of attention; the paper does not count them."""

    representatives = ("s2aformer_mini",)
    reconstructed = True
    shallow = {"s2aformer_mini": dict(depths=(1, 1), widths=(32, 64), heads=(1, 2), reductions=(2, 1))}
    costs = {
        "s2aformer_mini": (5_039_244, 0.4444),
        "s2aformer_t": (5_806_300, 0.6866),
        "s2aformer_xs": (6_545_608, 0.8163),
        "s2aformer_s": (10_681_628, 1.4215),
        "s2aformer_m": (24_844_108, 4.2071),
    }


# The published parameters in M and multiply-adds in G at 224 of convolutions and linear layers (arXiv 2505.22195), and
# the reconstruction's parameters without the classifier's head.
PUBLISHED = {
    "s2aformer_mini": (5.02, 0.430, 3_385_764),
    "s2aformer_t": (5.80, 0.655, 4_111_860),
    "s2aformer_xs": (6.54, 0.786, 4_851_168),
    "s2aformer_s": (10.69, 1.38, 8_823_348),
    "s2aformer_m": (24.87, 4.12, 22_903_908),
}


def linear_macs(model, size):
    """The multiply-adds without attention, as in the paper: its values at 224 and 256 are proportional to pixels."""
    return sum(x.flops for x in trace(model, size) if find(x.function) is None) / 2


class TestPublished:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_sizes(self, name):
        parameters, gmacs, _ = PUBLISHED[name]
        model = timm.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=5e-3)
        assert linear_macs(model, 224) / 1e9 == pytest.approx(gmacs, rel=1e-2)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_without_head(self, name):
        model = timm.create_model(name, features_only=True, device="meta")
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][2]


def conv(x, layer, **options):
    """A linear layer or convolution on (B, C, H, W), computed from its weights only."""
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
    return F.conv2d(x, weight, layer.bias, **options)


def layer_norm(x, norm):
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def batch_norm(x, norm):
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]


def attention(y, module, reduction):
    """Strip self-attention written out on (B, C, H, W)."""
    reduced = y
    if reduction > 1:
        below, right = -y.shape[2] % reduction, -y.shape[3] % reduction
        reduced = F.pad(y, (0, right, 0, below))
        reduced = batch_norm(conv(reduced, module.reduce.conv, stride=reduction, groups=y.shape[1]), module.reduce.norm)
    query, key, value = conv(y, module.q), conv(reduced, module.k), conv(reduced, module.v)
    out = []
    for head, part in enumerate(value.flatten(2).chunk(module.num_heads, 1)):  # B D L
        score = query[:, head].flatten(1)[:, :, None] * key[:, head].flatten(1)[:, None, :]
        out.append(part @ score.softmax(-1).transpose(1, 2))
    return conv(torch.cat(out, 1).unflatten(2, y.shape[2:]), module.proj)


class TestArchitecture:
    @pytest.mark.parametrize(("heads", "reduction"), [(3, 2), (1, 4), (2, 1)])
    def test_block_by_its_equations(self, heads, reduction):
        """x1 = x + DW(x), x2 = x1 + SSA(LN(x1)), x3 = x2 + LIM(LN(x2)), x4 = x3 + MLP(LN(x3)), on odd sides."""
        torch.manual_seed(0)
        block = s2aformer.HybridPerceptionBlock(12, heads, reduction, 4.0, 0.1).double().eval()
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            if value.is_floating_point():
                torch.nn.init.uniform_(value, 0.1, 1) if "running_var" in name else torch.nn.init.normal_(value, 0, 0.3)
        x = torch.randn(2, 12, 9, 7, dtype=torch.float64)
        with torch.no_grad():
            found = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            wanted = x + conv(x, block.dwconv, padding=1, groups=12)
            wanted = wanted + attention(layer_norm(wanted, block.norm1), block.attn, reduction)
            y = F.gelu(conv(layer_norm(wanted, block.norm2), block.lim.conv1, padding=1, groups=12))
            wanted = wanted + conv(batch_norm(y, block.lim.norm), block.lim.conv2, padding=1, groups=12)
            wanted = wanted + conv(F.gelu(conv(layer_norm(wanted, block.norm3), block.mlp.fc1)), block.mlp.fc2)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    def test_drop_path_spares_the_convolution(self):
        block = s2aformer.HybridPerceptionBlock(8, 1, 2, 4.0, 1.0).train()  # every branch is dropped
        x = torch.randn(2, 6, 6, 8)
        torch.testing.assert_close(block(x), x + on_maps(x, block.dwconv))

    def test_the_bias_of_keys_has_no_effect(self):
        """The bias of keys shifts all scores of a query equally; the bias of queries does not."""
        attention = s2aformer.StripSelfAttention(16, 2, 2).double()
        attention(torch.randn(2, 6, 6, 16, dtype=torch.float64)).square().sum().backward()
        assert attention.k.bias.grad.abs().max() < 1e-12 < 1e-6 < attention.q.bias.grad.abs().min()

    def test_dense_flavour_takes_a_classifiers_weights(self):
        """Only the norms of the maps are missing, and only the head is unexpected."""
        classifier = timm.create_model("s2aformer_mini")
        dense = timm.create_model("s2aformer_mini", features_only=True, norm_outputs=True)
        missing, unexpected = dense.load_state_dict(
            {f"model.{name}": value for name, value in classifier.state_dict().items()}, strict=False
        )
        assert {name.split(".")[1] for name in missing} == {"norm0", "norm1", "norm2", "norm3"}
        assert {name.split(".")[1] for name in unexpected} == {"head"}

    def test_a_head_that_lost_its_convolution_stays_plain(self):
        model = build("s2aformer_mini")
        x = image((64, 64))
        assert model.head_hidden_size == 1280
        model.reset_classifier(0, "")
        assert model.head_hidden_size == model.num_features == 288
        torch.testing.assert_close(model(x), model.forward_features(x))
        model.reset_classifier(5, "avg")
        assert model(x).shape == (1, 5)
        assert model.get_classifier().in_features == 288

    @pytest.mark.slow
    def test_one_exported_file_for_all_sizes(self, tmp_path):
        """Batch, height and width are open: attention takes all positions, so no size is a constant."""
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        model, path = build("s2aformer_mini"), tmp_path / "model.onnx"
        report = onnx_export.export_onnx(model, image((64, 96), batch=2), path, dynamic=("batch", "hw"))
        assert report.passed, report
        run, _, _ = open_file("onnx", path)
        for size, batch in (((97, 131), 1), ((224, 224), 3), ((33, 260), 2)):
            x = image(size, batch)
            with torch.no_grad():
                torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-4)

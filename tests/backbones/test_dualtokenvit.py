"""DualToken-ViT: the contract, the published sizes, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.seeded import build, image
from torch import nn

from terrazzo.backbones import dualtokenvit
from terrazzo.tools.inspect.measure import measure


class TestDualTokenViT(BackboneContract):
    representatives = ("dualtokenvit_tiny_mix",)
    operators_of = "s2aformer"
    reconstructed = True
    shallow = {"dualtokenvit_tiny_mix": dict(depths=(1, 1), widths=(32, 96))}
    costs = {
        "dualtokenvit_tiny": (5_909_984, 0.4793),
        "dualtokenvit_tiny_mix": (5_807_760, 0.4761),
        "dualtokenvit_small": (11_724_480, 1.0496),
        "dualtokenvit_small_mix": (11_412_720, 1.0407),
    }


def sizes(**changes):
    """The parameters in M and multiply-adds in G, at 224, of `dualtokenvit_small_mix` with changed arguments."""
    found = measure(timm.create_model("dualtokenvit_small_mix", device="meta", **changes), 224)
    return found.params / 1e6, found.macs / 1e9


class TestPublished:
    @pytest.mark.long
    @pytest.mark.parametrize(("size", "gmacs"), [("tiny_mix", 0.5), ("small_mix", 1.0)])
    def test_multiply_adds(self, size, gmacs):
        model = timm.create_model(f"dualtokenvit_{size}", device="meta")
        assert measure(model, 224).macs / 1e9 == pytest.approx(gmacs, rel=0.05)

    @pytest.mark.parametrize(
        ("size", "parameters"),
        [("tiny", 4_420_024), ("tiny_mix", 4_317_800), ("small", 10_111_448), ("small_mix", 9_799_688)],
    )
    def test_without_norm_neck_and_head(self, size, parameters):
        model = timm.create_model(f"dualtokenvit_{size}", features_only=True, device="meta")
        assert sum(p.numel() for p in model.parameters()) == parameters

    @pytest.mark.long
    def test_step_wise_downsampling(self, monkeypatch):
        """By the paper, it has 0.1 M parameters and 0.03 G multiply-adds more than pooling at once."""
        params, macs = sizes()
        monkeypatch.setattr(dualtokenvit, "HalvingStep", lambda dim, **factory: nn.Identity())
        at_once = sizes()
        assert round(params - at_once[0], 1) == 0.1
        assert round(macs - at_once[1], 2) == 0.03

    @pytest.mark.long
    def test_normal_mlp(self):
        """By the paper, it has slightly more parameters and multiply-adds than the mixed MLP."""
        (params, macs), mixed = sizes(mix=False), sizes()
        assert 0 < params - mixed[0] < 0.5
        assert 0 < macs - mixed[1] < 0.02


def norm(x, layer, eps):
    """Layer norm over the last axis, written out."""
    scale = (x.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
    return (x - x.mean(-1, keepdim=True)) * scale * layer.weight + layer.bias


def linear(x, layer, rows=slice(None)):
    return x @ layer.weight[rows].T + layer.bias[rows]


def mlp(x, layers):
    return linear(F.gelu(linear(x, layers.fc1)), layers.fc2)


def conv(x, layer):
    x = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=layer.padding, groups=layer.groups)
    return x.permute(0, 2, 3, 1)


def attention(query, key, value):
    """Multi-head attention, computed head by head."""
    heads = zip(*(x.split(32, -1) for x in (query, key, value)))
    return torch.cat([(q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v for q, k, v in heads], -1)


def halved(x):
    """The means of 2x2 patches of (B, H, W, C); an odd side repeats its last row or column."""
    x = torch.cat([x, x[:, -1:]], 1) if x.shape[1] % 2 else x
    x = torch.cat([x, x[:, :, -1:]], 2) if x.shape[2] % 2 else x
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def grid_of(x):
    """The 49 cells of (B, H, W, C); each cell is the mean of a slice."""
    height, width = x.shape[1:3]
    cells = [
        x[:, i * height // 7 : -(-(i + 1) * height // 7), j * width // 7 : -(-(j + 1) * width // 7)].mean((1, 2))
        for i in range(7)
        for j in range(7)
    ]
    return torch.stack(cells, 1)


def expected(block, x, tokens):
    """The result of a block, by the steps of the paper's section 3.1."""
    dim, glob = x.shape[-1], block.glob
    x = x + mlp(norm(conv(x, block.local.dwconv), block.local.norm, 1e-6), block.local.mlp)
    normed = norm(x, block.norm1, 1e-6)
    down = normed
    for step in glob.halvings:
        down = halved(conv(F.gelu(conv(down, step.dwconv)), step.pw))
    grid = grid_of(down)
    parts = (linear(grid, glob.qkv, slice(i * dim, (i + 1) * dim)) for i in range(3))
    found = norm(attention(*parts), glob.norm, 1e-6)
    if isinstance(glob.mlp, dualtokenvit.MixMlp):
        found = found + mlp(found.transpose(1, 2), glob.mlp.tokens).transpose(1, 2)
        found = linear(found, glob.mlp.channels)
    else:
        found = mlp(found, glob.mlp)
    tokens = glob.alpha * tokens + (1 - glob.alpha) * found
    key, value = linear(tokens, glob.kv, slice(0, dim)), linear(tokens, glob.kv, slice(dim, None))
    told = attention(linear(normed, glob.q).flatten(1, 2), key, value)
    x = x + linear(told, glob.proj).reshape(x.shape)
    y = mlp(norm(x, block.norm2, 1e-6), block.mlp)
    normed = norm(y, block.attn.norm, 1e-5)
    image_part = F.gelu(linear(normed.flatten(1, 2).mean(1), block.attn.global_reduce))
    local_part = F.gelu(linear(normed, block.attn.local_reduce))
    both = torch.cat([local_part, image_part[:, None, None].expand_as(local_part)], -1)
    of_channels = torch.sigmoid(linear(image_part, block.attn.channel_select))[:, None, None]
    return x + y * of_channels * torch.sigmoid(linear(both, block.attn.spatial_select)), tokens


@pytest.fixture
def block():
    """A function that builds a block with parameters far from their initial values."""

    def block_of(dim=64, halvings=1, mix=True):
        torch.manual_seed(0)
        found = dualtokenvit.DualTokenBlock(dim, halvings, mix, 2.0, 0.0).double()
        for parameter in found.parameters():
            nn.init.normal_(parameter, 0, 0.3)
        return found

    return block_of


def both(part, x, tokens):
    """The map and the tokens after a block or its global half."""
    state = dualtokenvit.Tokens(tokens=tokens)
    return part(x, state), state.tokens


def inputs(height=9, width=15, dim=64):
    torch.manual_seed(1)
    return torch.randn(2, height, width, dim).double(), torch.randn(2, 49, dim).double()


class TestBlock:
    @pytest.mark.parametrize(("halvings", "mix"), [(0, True), (1, False), (2, True)])
    @pytest.mark.parametrize("size", [(9, 15), (3, 28)])
    def test_by_its_steps(self, block, halvings, mix, size):
        one, (x, tokens) = block(halvings=halvings, mix=mix), inputs(*size)
        with torch.no_grad():
            for found, wanted in zip(both(one, x, tokens), expected(one, x, tokens)):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    def test_identity_on_the_map(self, block):
        one, (x, tokens) = block(), inputs()
        for layer in (one.local.mlp.fc2, one.glob.proj, one.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        assert torch.equal(both(one, x, tokens)[0], x)

    def test_alpha(self, block):
        """At 1 the tokens ignore the map; at 0 they forget their earlier values."""
        one, (x, tokens) = block(), inputs()
        nn.init.ones_(one.glob.alpha)
        assert torch.equal(both(one, x, tokens)[1], tokens)
        nn.init.zeros_(one.glob.alpha)
        torch.testing.assert_close(both(one, x, tokens)[1], both(one, x, 0 * tokens)[1])

    def test_equal_keys_tell_the_mean(self, block):
        one, (x, tokens) = block(), inputs()
        dim = x.shape[-1]
        with torch.no_grad():
            one.glob.kv.weight[:dim] = 0
            told, tokens = both(one.glob, x, tokens)
            mean = one.glob.proj(one.glob.kv(tokens)[..., dim:].mean(1))
        torch.testing.assert_close(told, mean[:, None, None].expand_as(told))

    def test_mixing_without_tokens_is_the_linear_layer(self):
        mixing, (_, tokens) = dualtokenvit.MixMlp(49, 64).double(), inputs()
        nn.init.zeros_(mixing.tokens.fc2.weight)
        nn.init.zeros_(mixing.tokens.fc2.bias)
        torch.testing.assert_close(mixing(tokens), mixing.channels(tokens))


class TestParts:
    @pytest.mark.parametrize("size", [(7, 7), (28, 14), (1, 2), (9, 15), (8, 100)])
    def test_exported_pooling_is_the_same(self, monkeypatch, size):
        x, _ = inputs(*size)
        wanted = dualtokenvit.pool_to_grid(x)
        torch.testing.assert_close(wanted, grid_of(x))
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(dualtokenvit.pool_to_grid(x), wanted)

    @pytest.mark.parametrize("size", [(8, 6), (7, 9)])
    def test_patch_merging(self, size):
        merging = dualtokenvit.LightPatchMerging(16, 24).double()
        nn.init.normal_(merging.norm.weight)
        nn.init.normal_(merging.norm.bias)
        x, _ = inputs(*size, dim=16)
        padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
        pixels = torch.cat([padded[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
        largest = F.max_pool2d(padded.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        wanted = norm(pixels, merging.norm, 1e-5) @ merging.reduction.weight.T + largest @ merging.res_proj.weight.T
        torch.testing.assert_close(merging(x), wanted)


class TestModel:
    def test_the_tokens_travel(self):
        """A stage's tokens enter the next stage; only their width changes."""
        model, seen = build("dualtokenvit_tiny_mix"), []
        for stage in model.stages:
            stage.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1].tokens))
            stage.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(args[1].tokens))
        features = model.forward_features(image((64, 96)))
        assert [tuple(tokens.shape) for tokens in seen] == [(1, 49, c) for c in (32, 32, 96, 96, 160, 160)]
        for before, after, stage in zip(seen[1::2], seen[2::2], model.stages[1:]):
            torch.testing.assert_close(stage.carry(before), after)
        torch.testing.assert_close(features[:, :49], model.neck(model.norm(seen[-1])))

    def test_pyramid(self):
        model = timm.create_model("dualtokenvit_small", features_only=True)
        assert model.feature_info.reduction() == [8, 16, 32]
        assert [tuple(x.shape[1:]) for x in model(image((224, 224)))] == [(64, 28, 28), (128, 14, 14), (256, 7, 7)]

    def test_dense_flavour_takes_a_classifiers_weights(self):
        """Only the norms of the maps are missing, and only norm, neck and head are unexpected."""
        classifier = timm.create_model("dualtokenvit_tiny")
        dense = timm.create_model("dualtokenvit_tiny", features_only=True, norm_outputs=True)
        missing, unexpected = dense.load_state_dict(
            {f"model.{name}": value for name, value in classifier.state_dict().items()}, strict=False
        )
        assert {name.split(".")[1] for name in missing} == {"norm0", "norm1", "norm2"}
        assert {name.split(".")[1] for name in unexpected} == {"norm", "neck", "head"}


def test_checkpoints_whose_numbers_have_no_dimension():
    """Checkpoints of earlier releases load by `load_state_dict` and by the filter of checkpoints."""
    model = build("dualtokenvit_tiny_mix", depths=(1, 1, 1))
    wanted = model.state_dict()
    old = {name: value.squeeze() if name.endswith(".alpha") else value for name, value in wanted.items()}
    assert {value.dim() for name, value in old.items() if name.endswith(".alpha")} == {0}
    model.load_state_dict(old, strict=True)
    found = dualtokenvit.checkpoint_filter_fn(old, model)
    assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in wanted.items()}

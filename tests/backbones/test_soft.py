"""SOFT and SOFT++: the contract, official outputs, the published sizes, and its architecture."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, packs
from support.seeded import bare, build, image

from terrazzo.backbones import soft
from terrazzo.errors import InputError, WeightsError
from terrazzo.kernels.softmax_free_attention import reference
from terrazzo.tools.inspect.measure import measure


class TestSOFT(BackboneContract):
    """Parameters equal the counts of the authors' classes. Multiply-adds in G count distances, sums and all steps."""

    representatives = ("soft_tiny",)
    shallow = {"soft_tiny": dict(depths=(1, 1), widths=(64, 64), stem_width=8)}
    untrained = ("soft_small", "soft_medium", "soft_large", "soft_huge", "softpp_huge")
    costs = {
        "soft_tiny": (13_069_056, 2.1159),
        "soft_small": (24_110_092, 3.7414),
        "soft_medium": (45_812_707, 8.6808),
        "soft_large": (64_700_646, 13.1796),
        "soft_huge": (87_108_273, 18.6546),
        "softpp_tiny": (13_069_056, 2.1159),
        "softpp_small": (24_110_092, 3.7414),
        "softpp_medium": (45_812_707, 8.6808),
        "softpp_large": (64_700_646, 13.1796),
        "softpp_huge": (87_108_273, 18.6546),
    }


def model_of(pack, **options):
    name = pack.meta["variant"].replace("soft_norm", "softpp")
    return bare(name, **options).double()


class TestOfficial:
    @pytest.mark.parametrize("path", packs("soft"), ids=lambda path: path.stem)
    def test_golden(self, path):
        """The packs hold landmarks that are nearly equal, so that an inverse in place of the steps would not pass."""
        pack = Pack(path)
        model = model_of(pack)
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = {f"module.{name}": value for name, value in pack.weights().items()}
        weights = soft.checkpoint_filter_fn({"state_dict_ema": weights, "state_dict": {}}, model)
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        model.load_state_dict(weights | counters, strict=True)
        for case in pack.meta["cases"]:
            x = pack.image(case)
            with torch.no_grad():
                maps, (tokens, state) = [], model.begin(x)
                for stage in model.stages:
                    tokens = stage(tokens, state)
                    maps.append(tokens if tokens.dim() == 3 else tokens.flatten(1, 2))
                for i, found in enumerate(maps):
                    assert list(found.shape) == case["stages"][i]["shape"]
                    ours, official = pack.sample(case, i, found)
                    torch.testing.assert_close(ours, official, rtol=0, atol=1e-8)
                torch.testing.assert_close(model(x), pack.logits(case), rtol=0, atol=1e-8)

    def test_depth_of_the_checkpoint(self):
        """The released `small` may have 20 blocks in stage 3: the message names the argument that fits them."""
        small = dict(widths=(64, 64, 64, 64), stem_width=8)
        deeper = timm.create_model("softpp_tiny", **small, depths=(1, 1, 4, 1))
        model = timm.create_model("softpp_tiny", **small, depths=(1, 1, 2, 1))
        hint = re.escape("4 blocks in stage 3, the model 2; create the model with depths=(1, 1, 4, 1)")
        with pytest.raises(WeightsError, match=hint):
            model.load_state_dict(deeper.state_dict())


def official_macs(name):
    """Multiply-adds at 224 in G: of layers alone, and with the authors' order of products, (K A) (K^T V)."""
    found, sizes = measure(timm.create_model(name, device="meta"), 224), (3136, 784, 196)
    own = theirs = 0
    model = timm.create_model(name, device="meta")
    for tokens, stage in zip(sizes, model.stages):
        heads = sum(block.attn.conv.groups for block in stage.blocks)
        rest = 3 * tokens * 49 * 32 + 40 * 49**3
        own += heads * (rest + 2 * 49**2 * 32)
        theirs += heads * (rest + 49**2 * 32 + tokens * 49**2)
    return found.macs / 1e9 - own / 1e9, found.macs / 1e9 + (theirs - own) / 1e9


@pytest.mark.parametrize(
    ("name", "layers", "everything"),
    [
        ("soft_tiny", 1.830, 2.157),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("soft_small", 3.185, 3.806),
                ("soft_medium", 7.017, 8.820),
                ("soft_large", 10.712, 13.374),
                ("soft_huge", 15.315, 18.918),
            )
        ),
    ],
)
def test_multiply_adds(name, layers, everything):
    """Counts of the authors' classes; the published 1.9 to 16.3 G are of layers and of element-wise operations."""
    found = official_macs(name)
    # Stage 4's softmax attention counts among the products that are no layers.
    attention = len(timm.create_model(name, device="meta").stages[3].blocks) * 2 * 50**2 * 512 / 1e9
    assert found[0] - attention == pytest.approx(layers, abs=2e-3)
    assert found[1] == pytest.approx(everything, abs=2e-3)


def small(name="soft_tiny", **options):
    """Four stages of one block of 64 channels."""
    return build(name, **{**dict(depths=(1, 1, 1, 1), widths=(64, 64, 64, 64), stem_width=8), **options})


class TestArchitecture:
    @pytest.fixture
    def calls(self, monkeypatch):
        """The arguments of the operator's calls: query, value, landmark."""
        seen, operator = [], soft.softmax_free_attention

        def watched(*arguments, **options):
            seen.append((*arguments, options))
            return operator(*arguments, **options)

        monkeypatch.setattr(soft, "softmax_free_attention", watched)
        return seen

    @torch.no_grad()
    def test_grids_and_landmarks(self, calls):
        maps = small().forward_intermediates(image((256, 192)), intermediates_only=True)
        assert [tuple(x.shape[2:]) for x in maps] == [(64, 48), (32, 24), (16, 12), (8, 6)]
        assert [landmark.shape[2] for _, _, landmark, _ in calls] == [48, 48, 48]

    @torch.no_grad()
    def test_landmarks_see_scaled_queries(self, calls):
        model = small().double()
        model(image((64, 96)).double())
        layer, (query, _, landmark, options) = model.stages[0].blocks[0].attn, calls[0]
        maps = query.transpose(2, 3).unflatten(3, (16, 24))
        for head in range(2):
            cells = F.conv2d(maps[:, head], layer.Qlandmark_op.weight, stride=8).flatten(2).transpose(1, 2)
            wanted = F.gelu(F.layer_norm(cells, (32,), layer.Qnorm_act[0].weight, layer.Qnorm_act[0].bias))
            torch.testing.assert_close(landmark[:, head], wanted)
        assert options == dict(normalised=False, alpha_scope="global")
        x = torch.randn(1, 16, 24, 64, dtype=torch.float64)
        before = layer(x)
        torch.testing.assert_close(
            calls[-1][0].transpose(1, 2).flatten(2).flatten(0, 1), layer.W_q(x).flatten(0, 2) / 32**0.25
        )
        layer.W_q.bias.add_(1)  # no invariance: landmarks move otherwise than queries
        assert not torch.allclose(layer(x), before, atol=1e-3)

    @torch.no_grad()
    def test_block(self):
        """Post-norm, with a local branch of one kernel per head, an MLP with tanh's GELU, and eps of 1e-5."""
        block = small().double().stages[1].blocks[0]
        x = torch.randn(2, 8, 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        attn = block.attn
        query, value = (layer(x).flatten(1, 2).unflatten(2, (2, 32)).transpose(1, 2) for layer in (attn.W_q, attn.W_v))
        cells = attn.Qlandmark_op((query / 32**0.25).transpose(2, 3).flatten(0, 1).unflatten(2, (8, 6)))
        landmark = attn.Qnorm_act(cells.flatten(2).transpose(1, 2)).unflatten(0, (2, 2))
        out = reference.softmax_free_attention(query / 32**0.25, None, value, landmark, False, "matrix", False)
        # As in the authors' code: heads as channels, the channels of a head as a batch.
        heads = value.transpose(2, 3).unflatten(3, (8, 6)).transpose(1, 2).flatten(0, 1)
        local = F.conv2d(heads, attn.conv.weight, padding=2, groups=2).unflatten(0, (2, 32)).transpose(1, 2)
        out = (out + local.flatten(3).transpose(2, 3)).transpose(1, 2).flatten(2).view(x.shape)
        y = F.layer_norm(x + attn.ff(out), (64,), block.norm1.weight, block.norm1.bias, 1e-5)
        hidden = F.gelu(block.mlp.fc1(y), approximate="tanh")
        wanted = F.layer_norm(y + block.mlp.fc2(hidden), (64,), block.norm2.weight, block.norm2.bias, 1e-5)
        torch.testing.assert_close(block(x), wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["soft_tiny", "softpp_tiny"])
    def test_heads_can_change_places(self, name):
        layer = small(name).double().stages[2].blocks[0].attn
        x = torch.randn(1, 6, 6, 64, dtype=torch.float64)
        wanted, order = layer(x), torch.arange(64).view(2, 32).flip(0).flatten()
        for linear in (layer.W_q, layer.W_v):
            linear.weight.copy_(linear.weight[order])
            linear.bias.copy_(linear.bias[order])
        layer.conv.weight.copy_(layer.conv.weight.flip(0))
        layer.ff.weight.copy_(layer.ff.weight[:, order])
        torch.testing.assert_close(layer(x), wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["soft_tiny", "softpp_tiny"])
    def test_float32_is_near_float64(self, name):
        model, x = build(name), image((96, 64))
        found = model(x)
        wanted = model.double()(x.double())
        assert (found - wanted).norm() < 5e-6 * wanted.norm()

    @torch.no_grad()
    def test_positions_of_the_class_token_are_not_resized(self):
        model = small()
        stage = model.stages[3]
        assert stage.pos_embed.shape == (1, 50, 64)
        seen = []
        stage.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(image((64, 96)))
        torch.testing.assert_close(seen[0][:, 0], (stage.cls_token + stage.pos_embed[:, :1])[:, 0])
        table = stage.pos_embed[:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
        wanted = F.interpolate(table, (2, 3), mode="bilinear", align_corners=False)
        torch.testing.assert_close(stage.positions(torch.empty(1, 2, 3, 64)).permute(0, 3, 1, 2), wanted)
        assert torch.equal(stage.positions(torch.empty(1, 7, 7, 64)).flatten(1, 2), stage.pos_embed[:, 1:])

    @torch.no_grad()
    @pytest.mark.parametrize("scope", ["matrix", "global"])
    def test_scope_of_alpha(self, scope):
        """With "matrix" an image's logits do not depend on its neighbours in the batch; as published they do."""
        model = small("softpp_tiny", alpha_scope=scope).double()
        for stage in model.stages[:3]:
            stage.blocks[0].attn.Qnorm_act[0].weight.mul_(0.5)  # landmarks that are nearly equal
        x = image((160, 128), batch=2).double()
        x[1] = 0
        difference = (model(x)[:1] - model(x[:1])).abs().max()
        assert difference < 1e-9 if scope == "matrix" else difference > 1e-6

    def test_images_that_are_too_small(self):
        with pytest.raises(InputError, match=r"sides must be at least 8.* got \(7, 16\)"):
            small()(image((28, 64)))
        small(ratios=(2, 2, 1))(image((28, 64)))

    def test_dropout_follows_the_schedule_of_stochastic_depth(self):
        model = timm.create_model("soft_tiny", drop_path_rate=0.7, device="meta")
        rates = [block.drop.p for stage in model.stages[:3] for block in stage.blocks]
        rates += [getattr(block.drop_path, "drop_prob", 0.0) for block in model.stages[3].blocks]
        assert rates == pytest.approx([i / 10 for i in range(8)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft_tiny", "softpp_tiny"])
def test_200_steps_in_bfloat16_stay_finite(name):
    """Landmarks begin nearly equal, where users of the official code report NaN."""
    model = small(name, num_classes=4, drop_path_rate=0.1).train()
    with torch.no_grad():
        for stage in model.stages[:3]:
            stage.blocks[0].attn.Qnorm_act[0].weight.mul_(0.05)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = image((96, 96), batch=4), torch.arange(4)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["soft_tiny", "softpp_tiny"])
def test_1024_pixels(name):
    """1024 landmarks per head; a model of one block of each kind."""
    model = small(name, depths=(1, 1), widths=(64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image((1024, 1024))).isfinite().all()

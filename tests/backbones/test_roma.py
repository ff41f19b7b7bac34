"""RoMA: the contract, official weights, and its architecture."""

import pytest
import timm
import torch
import torch.nn.functional as F
from support.contract import BackboneContract
from support.golden_packs import Pack, packs
from support.seeded import bare, build, image

from terrazzo.backbones import roma
from terrazzo.backbones._layers import bicubic
from terrazzo.kernels.selective_scan.reference import sequence


class TestRoMA(BackboneContract):
    """Parameters are counted in the authors' classes. Multiply-adds: linear layers, convolutions, 9 L D N per scan."""

    operators_of = "vmamba"
    representatives = ("roma_tiny",)
    untrained = ("roma_tiny", "roma_small")
    shallow = {"roma_tiny": dict(depth=1)}
    costs = {
        "roma_tiny": (22_167_400, 4.198 + 0.523),
        "roma_small": (38_594_016, 7.377 + 0.697),
        "roma_base": (85_031_656, 16.413 + 1.046),
        "roma_large": (297_035_720, 57.856 + 2.789),
    }


def pretrained(dim=24, depth=6, side=4):
    """A pretraining checkpoint with the authors' names."""
    torch.manual_seed(0)
    rank, hidden = -(-dim // 16), dim * 8 // 3
    shapes = {
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "pos_embed": (1, side * side, dim),
        "angle_embed": (1, dim),
        "ar_token": (1, 1, 512),
        "dec_pos_embed": (1, side * side, 512),
        "mask": (8, 8),
        "enc2dec.weight": (2048, 4 * dim),
        "dec_block.0.attn2.q.weight": (512, 512),
        "norm_1.weight": (dim,),
        "ar_norm.weight": (512,),
        "ar_pred.weight": (768, 512),
    }
    for i in range(depth):
        block = {
            **{
                f"mixer.{name}.weight": shape for name, shape in (("in_proj", (2 * dim, dim)), ("out_proj", (dim, dim)))
            },
            **{"mixer.A_log": (dim, 16), "mixer.D": (dim,)},
            **{"mixer.conv1d.weight": (dim, 1, 4), "mixer.conv1d.bias": (dim,)},
            **{"mixer.x_proj.weight": (rank + 32, dim)},
            **{"mixer.dt_proj.weight": (dim, rank), "mixer.dt_proj.bias": (dim,)},
            **{f"mlp.{name}.weight": (hidden, dim) for name in ("w1", "w2")},
            **{f"mlp.{name}.bias": (hidden,) for name in ("w1", "w2")},
            **{"mlp.w3.weight": (dim, hidden), "mlp.w3.bias": (dim,)},
            **{f"norm{n}.{part}": (dim,) for n in (1, 2) for part in ("weight", "bias")},
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class TestOfficial:
    @pytest.mark.parametrize("path", packs("roma"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        model = bare("roma_tiny")
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        weights = roma.checkpoint_filter_fn({"model": pack.weights()}, model)
        model.load_state_dict(weights, strict=True)
        for case in pack.meta["cases"]:
            with torch.no_grad():
                found, wanted = model(pack.image(case).float()), pack.logits(case).float()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * case["logits_std"])

    def test_pretraining_checkpoint(self):
        """All directions start from the pretrained direction; the decoder is dropped; token, norm, classifier stay."""
        official = pretrained()
        model = timm.create_model("roma_tiny", embed_dim=24, depth=6, img_size=64)
        own = model.state_dict()
        weights = roma.checkpoint_filter_fn({"model": official}, model)
        model.load_state_dict(weights, strict=True)
        for i in range(4):
            for ours, theirs in (
                ("conv1d.weight", "conv1d.weight"),
                ("A_log", "A_log"),
                ("dt_proj.bias", "dt_proj.bias"),
            ):
                assert torch.equal(weights[f"blocks.3.mixer.scans.{i}.{ours}"], official[f"layers.3.mixer.{theirs}"])
        assert torch.equal(weights["stem.cls_token"], own["stem.cls_token"])
        assert torch.equal(weights["head.fc.weight"], own["head.fc.weight"])
        positions = weights["stem.pos_embed"]
        assert not positions[:, 8].any()
        assert torch.equal(positions[:, :8], official["pos_embed"][:, :8])
        assert torch.equal(positions[:, 9:], official["pos_embed"][:, 8:])

    def test_pretraining_checkpoint_for_another_size(self):
        official = pretrained()
        model = timm.create_model(
            "roma_tiny", embed_dim=24, depth=6, img_size=96, features_only=True, norm_outputs=True
        )
        weights = roma.checkpoint_filter_fn({"state_dict": official}, model.model)
        grid = official["pos_embed"].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        wanted = F.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(roma.without_token(weights["stem.pos_embed"]), wanted, rtol=1e-4, atol=1e-5)
        missing, unexpected = model.model.load_state_dict(weights, strict=False)
        assert (missing, unexpected) == ([], [])

    def test_positions_are_resized_the_same_under_autocast(self):
        positions = pretrained()["pos_embed"]
        wanted = roma.resize_positions(positions, (5, 7))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(roma.resize_positions(positions, (5, 7)), wanted)

    @pytest.mark.long
    def test_segmentors_backbone(self):
        """Its single norm becomes the last map's norm; its pyramid is a neck here."""
        pack = Pack(packs("roma")[0])
        official = pack.weights() | {"fpn1.0.weight": torch.zeros(384, 384, 2, 2), "fpn2.0.bias": torch.zeros(384)}
        model = timm.create_model("roma_tiny", norm_outputs=True, num_classes=0, device="meta")
        model.prune_intermediate_layers([11])
        weights = roma.checkpoint_filter_fn({f"backbone.{name}": value for name, value in official.items()}, model)
        assert torch.equal(weights["norm11.weight"], official["norm_f.weight"])
        assert model.state_dict().keys() == {name for name in weights if not name.startswith("head.")}


def scan(module, x):
    """A single direction on (B, L, C), by its definition."""
    kernel = module.conv1d.weight[:, 0]
    padded = torch.cat([x.new_zeros(len(x), 3, x.shape[2]), x], 1)
    u = F.silu(sum(padded[:, k : k + x.shape[1]] * kernel[:, k] for k in range(4)) + module.conv1d.bias)
    delta, B, C = F.linear(u, module.x_proj.weight).split([module.rank, 16, 16], -1)
    delta = F.softplus(module.dt_proj(delta))
    return sequence(u, delta, -module.A_log.exp(), B, C) + module.D * u


def lively(module):
    for value in module.parameters():
        torch.nn.init.normal_(value, 0, 0.5)
    return module.double().eval()


class TestArchitecture:
    @pytest.mark.parametrize("size", [(3, 5), (4, 4)])
    def test_mixer_by_its_definition(self, size):
        """The definition gates each direction; by columns, the token is removed and inserted in the middle again."""
        torch.manual_seed(0)
        (height, width), dim = size, 6
        mixer = lively(roma.Mixer(dim, 4))
        x = torch.randn(2, height * width + 1, dim, dtype=torch.float64)
        middle = height * width // 2

        def turned(y, rows, columns):
            patches = torch.cat([y[:, :middle], y[:, middle + 1 :]], 1).view(2, rows, columns, dim)
            patches = patches.transpose(1, 2).reshape(2, -1, dim)
            return torch.cat([patches[:, :middle], y[:, middle : middle + 1], patches[:, middle:]], 1)

        with torch.no_grad():
            value, gate = mixer.in_proj(x).chunk(2, -1)
            total = 0
            for i, direction in enumerate(mixer.scans):
                u, z = ((turned(y, height, width) if i > 1 else y) for y in (value, gate))
                u, z = ((y.flip(1) if i % 2 else y) for y in (u, z))
                y = scan(direction, u) * F.silu(z)
                y = y.flip(1) if i % 2 else y
                total = total + (turned(y, width, height) if i > 1 else y)
            found = mixer(x, roma.Grid.of(height, width, x.device))
        torch.testing.assert_close(found, mixer.proj_out(total / 4), rtol=1e-10, atol=1e-10)

    def test_a_turned_map_swaps_the_pairs(self):
        torch.manual_seed(0)
        mixer, x = lively(roma.Mixer(6, 4)), torch.randn(1, 16, 6, dtype=torch.float64)
        grid, turned = roma.Grid.of(3, 5, x.device), roma.Grid.of(5, 3, x.device)
        assert torch.equal(grid.columns[grid.rows], torch.arange(16))
        with torch.no_grad():
            wanted = mixer(x, grid)[:, grid.columns]
            mixer.scans = mixer.scans[2:] + mixer.scans[:2]
            torch.testing.assert_close(mixer(x[:, grid.columns], turned), wanted)

    @pytest.mark.long
    def test_one_direction_is_causal(self):
        mixer = lively(roma.Mixer(6, 1))
        x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
        mixer(x, None)[:, 4].sum().backward()
        reached = x.grad.abs().sum((0, 2)) > 0
        assert reached.tolist() == [True] * 5 + [False] * 4

    def test_every_direction_matters(self):
        model, x = build("roma_tiny", embed_dim=32, depth=2), image((64, 96))
        with torch.no_grad():
            before = model(x)
            for i in range(4):
                changed = build("roma_tiny", embed_dim=32, depth=2)
                changed.blocks[0].mixer.scans[i].D.add_(1)
                assert (changed(x) - before).abs().max() > 1e-4

    def test_positions(self):
        """Positions equal the parameter to the bit at the native size, and F.interpolate's result at other sizes."""
        x = torch.randn(1, 196, 8)
        assert torch.equal(roma.resize_positions(x, (14, 14)), x)
        assert torch.equal(bicubic(14, 14, x), torch.eye(14))
        for size in ((2, 2), (7, 31), (24, 15)):
            grid = x.double().unflatten(1, (14, 14)).permute(0, 3, 1, 2)
            wanted = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
            torch.testing.assert_close(roma.resize_positions(x.double(), size), wanted, rtol=1e-9, atol=1e-9)

    def test_class_token_is_in_the_middle(self):
        model, x = build("roma_tiny", embed_dim=32, depth=6), image((64, 96))
        with torch.no_grad():
            model.stem.proj.weight.zero_()
            model.stem.proj.bias.zero_()
            sequence, grid = model.begin(x)
            token = model.stem.cls_token + model.stem.pos_embed[:, 98:99]
            torch.testing.assert_close(sequence[:, 12:13], token)
            features = model.forward_features(image((64, 96)))
            torch.testing.assert_close(model(x), model.head.fc(features[:, 12]))
            model.reset_classifier(3, "avg")
            patches = torch.cat([features[:, :12], features[:, 13:]], 1)
            torch.testing.assert_close(model.forward_head(features, pre_logits=True), patches.mean(1))
        assert (grid.height, grid.width) == (4, 6)

    def test_drop_path_is_shifted(self):
        blocks = timm.create_model("roma_tiny", drop_path_rate=0.11, device="meta").blocks
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0, 0, *(0.01 * i for i in range(1, 11))])

    def test_initial_steps(self):
        """Steps begin between 0.001 and 0.1, and later initialisation does not change them; decays are 1 to 16."""
        scans = [s for block in timm.create_model("roma_tiny", depth=2).blocks for s in block.mixer.scans]
        steps = torch.stack([F.softplus(s.dt_proj.bias) for s in scans])
        assert 9e-4 < steps.min() < 2e-3 < 5e-2 < steps.max() < 0.11
        assert all(torch.equal(s.A_log.exp().round(), torch.arange(1, 17).expand(384, 16)) for s in scans)

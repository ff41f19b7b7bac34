"""MCTF: the contract, official weights, the plain ViT underneath, and maps of every position."""

import copy

import pytest
import timm
import torch
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare

from terrazzo.backbones import _place, _tokens, mctf
from terrazzo.backbones._hosted import hosted
from terrazzo.backbones._layers import bicubic
from terrazzo.errors import InputError
from terrazzo.kernels.token_reduction import merge, plan, unmerge

TINY = "mctf_deit_tiny"


class TestMCTF(BackboneContract):
    """Parameters and multiply-adds in G are those of the authors' classes (base: by their formula; unpublished)."""

    representatives = (TINY,)
    shallow = {TINY: dict(depth=2, blocks=(1,))}
    cut_gradient = True  # merged tokens' weights have no gradient
    refused = {"onnx dynamic hw": "token reduction is exported for images of one size"}
    costs = {
        "mctf_deit_tiny": (5_717_416, 0.7092),
        "mctf_deit_tiny_fast": (5_717_416, 0.7481),
        "mctf_deit_small": (22_050_664, 2.6016),
        "mctf_deit_small_fast": (22_050_664, 2.7564),
        "mctf_deit_base": (86_567_656, 9.936),
        "mctf_deit_base_fast": (86_567_656, 10.554),
    }


@pytest.fixture(scope="module")
def deit():
    """timm's DeiT; no weight has a value that hides a mistake."""
    return build("deit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)


def of(deit, **kwargs):
    model = timm.create_model(TINY, **kwargs).eval()
    model.load_state_dict(mctf.checkpoint_filter_fn(deit.state_dict(), model), strict=not kwargs.get("norm_outputs"))
    return model


class TestOfficial:
    @pytest.mark.parametrize("path", packs("mctf"), ids=lambda path: path.stem)
    def test_golden(self, path):
        pack = Pack(path)
        options = pack.meta["options"][1].strip("[]").split(", ")
        name = "mctf_deit_tiny_fast" if float(options[0]) < 1 else TINY
        model = bare(name, bidirectional=options[8] == "1").double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        assert list(model.reducer.blocks) == eval(pack.meta["options"][2], {})
        checkpoint = {"model": pack.weights(), "epoch": 29}
        model.load_state_dict(mctf.checkpoint_filter_fn(checkpoint, model), strict=True)
        for case in pack.meta["cases"]:
            with torch.no_grad():
                torch.testing.assert_close(model(pack.image(case)), pack.logits(case), rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        ("options", "tokens", "wanted"),
        [
            (dict(r=16), 197, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21]),
            (dict(r=20), 197, [177, 157, 137, 117, 97, 77, 57, 37, 19, 10, 10]),
            (dict(r=0.35), 197, [129, 85, 56]),
            (dict(r=0.35), 577, [376, 245, 160]),
            (dict(r=0.35), 1025, [667, 434, 283]),
            (dict(r=0.35, multiple=8), 1024, [672, 440, 288]),
            (dict(r=16), 5, [5]),
            (dict(r=0.35), 10, [10]),
        ],
    )
    def test_schedule(self, options, tokens, wanted):
        fusion, found = mctf.Fusion(**options, blocks=()), []
        for _ in wanted:
            tokens -= fusion.count(tokens, fusion.r)
            found.append(tokens)
        assert found == wanted

    def test_weights_of_another_grid(self, deit):
        """A model for 384 takes positions for 224 and resizes them as timm does."""
        model = timm.create_model(TINY, grid=(24, 24), r=0).eval()
        model.load_state_dict(mctf.checkpoint_filter_fn(deit.state_dict(), model), strict=True)
        x = image((384, 384))
        with torch.no_grad():
            torch.testing.assert_close(model(x), deit(x))

    def test_own_names_pass(self):
        model = timm.create_model(TINY, num_classes=0, norm_outputs=True, device="meta")
        assert mctf.checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()

    def test_gradients_of_merged_and_recomputed_attention_differ(self):
        """Attention is computed once, before merging, so queries of a merging block learn from unmerged tokens."""
        model = build(TINY, depth=2)
        model(image((128, 128))).square().sum().backward()
        grad = model.blocks[1].attn.qkv.weight.grad
        assert grad.isfinite().all()
        assert all(part.abs().sum() > 0 for part in grad.chunk(3))

    @pytest.mark.parametrize("sizes", [False, True])
    @torch.no_grad()
    def test_without_informativeness_nothing_is_computed_ahead(self, deit, sizes):
        """timm's block runs on merged tokens, with keys weighted by sizes; merging also weights tokens by size."""
        block = hosted(copy.deepcopy(deit.blocks[1]).double())
        fusion = mctf.Fusion((1,), r=4, criteria=(1, 0, 40))
        x = image((64, 64)).double().flatten(1)[:, : 17 * 192].unflatten(1, (17, 192))
        size = torch.arange(1.0, 18).expand(len(x), -1).double() if sizes else None
        state = fusion.begin((4, 4), 1, 1, maps=False)
        state.size = size
        found = fusion(block, x, state)
        merged, wanted, _ = merge(x, plan(x, r=4, size=size, criteria=(1, 0, 40), bidirectional=True), size, size)
        torch.testing.assert_close(state.size, wanted, rtol=0, atol=1e-12)
        mask = wanted.log()[:, None, None]
        torch.testing.assert_close(found, block(merged, attn_mask=mask), rtol=0, atol=1e-12)
        deit.float()


class TestPlainViT:
    @pytest.mark.parametrize(
        ("restore", "size"), [("delta", (224, 224)), ("delta", (97, 131)), ("copy", (97, 131)), ("soft", (97, 131))]
    )
    def test_without_merging_it_is_timms_to_the_bit(self, deit, restore, size):
        model, x = of(deit, r=0, restore=restore), image(size, batch=2)
        with torch.no_grad():
            assert torch.equal(model(x), deit(x))
            taps = dict(indices=[0, 11], intermediates_only=True)
            for found, wanted in zip(model.forward_intermediates(x, **taps), deit.forward_intermediates(x, **taps)):
                assert torch.equal(found, wanted)
            dense = of(deit, r=0, restore=restore, norm_outputs=True)
            (found,) = dense.forward_intermediates(x, indices=1, intermediates_only=True)
            (wanted,) = deit.forward_intermediates(x, indices=1, intermediates_only=True)
            assert torch.equal(dense.norm11(wanted.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), found)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_compiled_positions_are_resized_the_same(self, deit, autocast):
        torch._dynamo.reset()
        stem = of(deit, r=0).stem
        compiled = torch.compile(stem.positions, backend="eager", fullgraph=True, dynamic=True)
        for grid in ((14, 14), (7, 9), (20, 33)):
            wanted = stem.positions(grid)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                torch.testing.assert_close(compiled(grid), wanted)
        assert torch.equal(bicubic(14, 14, wanted, antialias=True), torch.eye(14))

    def test_pooling_weighs_positions(self):
        """A mean over the remaining tokens counts a token once for each position that it stands for."""
        model, x = build(TINY, global_pool="avg"), image((128, 96), batch=2)
        with torch.no_grad():
            maps = build(TINY, global_pool="avg", restore="copy").forward_intermediates(x, intermediates_only=True)
            wanted = model.head.fc(model.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2)))
            torch.testing.assert_close(model(x), wanted)
            assert model.forward_features(x).shape == (2, 1 + 8 * 6, 192)
            model.reset_classifier(1000, "token")
            assert model.forward_features(x).shape[1] == 10

    def test_nothing_is_kept_for_a_classifier(self, monkeypatch):
        """If no maps are requested, no level is recorded."""
        model, seen = build(TINY, depth=3), []
        forward = mctf.Fusion.forward
        monkeypatch.setattr(mctf.Fusion, "forward", lambda *args: seen.append(args[-1].maps) or forward(*args))
        model(image((128, 128)))
        assert seen == [False] * 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"restore": "nearest"}, "restore must be one of copy, delta, soft, got 'nearest'"),
            ({"full_last": 13}, "full_last must be 0 to the 12 blocks, got 13"),
            ({"r": 2.5}, "r must be a part below 1, or a whole number of tokens, got 2.5"),
            ({"r": -1}, "r must be a part below 1"),
            ({"criteria": (1, 2)}, "criteria must be three numbers"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            timm.create_model(TINY, device="meta", **options)


restored = _tokens.Reducer().restored


def reduced(x, steps, blocks=lambda x: x, grid=(6, 4)):
    """The tokens and the state after alternating blocks and merges."""
    state = _tokens.Reducer().begin(grid, 1, 0, maps=True)
    for r in steps:
        x = blocks(x)
        found = plan(x, r=r, size=state.size)
        merged, size, assignment = merge(x, found, size=state.size)
        state.reduced(x, merged, assignment, size)
        x = merged
    return blocks(x), state


class TestRestore:
    @pytest.fixture
    def x(self):
        return torch.randn(2, 25, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def test_idle_blocks(self, x):
        """Mode "delta" restores the input; mode "copy" gives the projection: members of a group are equal."""
        z, state = reduced(x, (6, 5))
        torch.testing.assert_close(restored(z, state, "delta"), x, rtol=0, atol=1e-12)
        copied = restored(z, state, "copy")
        first, second = state.levels
        assert torch.equal(copied, unmerge(z, second.map.gather(1, first.map)))
        assert not torch.allclose(copied, x)

    def test_delta_is_the_lifting_form(self, x):
        """Each level is restored in turn: the copied tokens, plus the difference that merging removed."""
        z, state = reduced(x, (6, 5, 3), blocks=lambda t: t + t.tanh() * t.mean(1, keepdim=True))
        wanted = z
        for level in reversed(state.levels):
            wanted = unmerge(wanted, level.map) + level.left - unmerge(level.merged, level.map)
        torch.testing.assert_close(restored(z, state, "delta"), wanted, rtol=0, atol=1e-12)

    def test_soft_is_a_mean_of_the_nearest(self, x):
        """Weights add up to 1, so a constant stays; the class token stays, too; nearer tokens have larger weights."""
        z, state = reduced(x, (6,))
        ones = torch.ones_like(z)
        torch.testing.assert_close(restored(ones, state, "soft"), torch.ones_like(x))
        found = restored(z, state, "soft")
        assert torch.equal(found[:, 0], z[:, 0])
        level = state.levels[0]
        distance = (level.left[:, 1:, None] - level.merged[:, None, 1:]).square().sum(-1)
        wanted = (-_tokens.TEMPERATURE * distance).softmax(-1) @ z[:, 1:]  # with 18 tokens, all are among the nearest
        torch.testing.assert_close(found[:, 1:], wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["copy", "delta"])
    def test_gradients(self, x, mode):
        def run(t):
            z, state = reduced(t, (6, 5), blocks=lambda u: u + u.tanh())
            return restored(z, state, mode)

        assert torch.autograd.gradcheck(run, (x[:1, :, :3].requires_grad_(),))

    @pytest.mark.parametrize("mode", ["copy", "delta"])
    @pytest.mark.parametrize("proportional", [True, False])
    def test_duplicates_lose_nothing(self, deit, mode, proportional, monkeypatch):
        """If equal tokens are merged and restored, and keys count by size, results equal the full model's results."""
        model = of(deit, depth=12, r=0, restore=mode).double()
        groups = torch.arange(1, 13).repeat_interleave(2)
        tokens = torch.randn(1, 13, 192, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = tokens[:, torch.cat([torch.zeros(1, dtype=torch.int64), groups])]
        if not proportional:
            monkeypatch.setattr(_place, "prop_bias", lambda size: None)
        with torch.no_grad():
            full = model.reducer.begin((6, 4), 1, 0, maps=True)
            wanted = x
            for block in model.blocks:
                wanted = model.reducer(block, wanted, full)
            found, state = reduced(x, (12,))
            assert state.size.tolist() == [[1, *[2] * 12]]
            for block in model.blocks:
                found = model.reducer(block, found, state)
            found = restored(found, state, mode)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10) == proportional

    def test_the_last_block_sees_every_position(self, deit):
        """In the detectors' flavour, the last block runs on the restored tokens."""
        model, x = of(deit, r=0.35, blocks=(3, 6, 9), norm_outputs=True), image((128, 96))
        without = of(deit, r=0.35, blocks=(3, 6, 9), norm_outputs=True, full_last=0)
        assert (model.full_last, without.full_last) == (1, 0)
        taps = dict(indices=[10, 11], intermediates_only=True)
        with torch.no_grad():
            early, late = model.forward_intermediates(x, **taps)
            unchanged, other = without.forward_intermediates(x, **taps)
            torch.testing.assert_close(early, unchanged)
            assert not torch.allclose(late, other)
            tokens, state = without.begin(x)
            for block in without.blocks[:-1]:
                tokens = without.run_unit(block, tokens, state)
            tokens = model.blocks[-1](restored(tokens, state, "delta"))
            wanted = model.norm11(tokens[:, 1:].unflatten(1, (8, 6))).permute(0, 3, 1, 2)
            torch.testing.assert_close(late, wanted)

    def test_cells_first(self, deit):
        """The dense schedule merges within 2x2 cells first, then anywhere, by similarity and size, without weights."""
        model = of(deit, r=0.35, blocks=(3, 6), cells_first=True, criteria=(1, 0, 40), multiple=8)
        tokens, state = model.begin(image((256, 192)))
        with torch.no_grad():
            for block in model.blocks:
                tokens = model.run_unit(block, tokens, state)
        first = state.levels[0].map[0, 1:].view(16, 12)
        cells = {(row // 2, column // 2) for row in range(16) for column in range(12)}
        corners = {int(first[2 * row, 2 * column]) for row, column in cells}
        assert len(corners) == len(cells) == 48  # every cell keeps a token
        assert [level.left.shape[1] for level in state.levels] == [193, 128]
        assert tokens.shape[1] == 88
        assert state.size.sum().item() == 193


class TestExport:
    @pytest.mark.slow  # the contract exports a merging block
    def test_onnx_of_every_merging_block(self, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        model = build(TINY, depth=4)
        report = onnx_export.export_onnx(model, image((128, 128)), tmp_path / "model.onnx", dynamic=("batch",))
        assert report.passed, report
        assert report.worst <= 1e-4

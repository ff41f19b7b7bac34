"""AS-ViT: the contract, the official inference, and a comparison of its forms."""

import copy

import pytest
import timm
import torch
from support.contract import BackboneContract, build, image
from support.golden_packs import Pack, packs
from support.seeded import bare

from terrazzo.backbones import asvit
from terrazzo.errors import InputError

TINY = "asvit_deit_tiny"


class TestASViT(BackboneContract):
    """Parameters: the host's and three thresholds. Multiply-adds in G: the host's; masking does not lower them."""

    operators_of = "mctf"
    representatives = (TINY,)
    shallow = {TINY: dict(depth=2, blocks=(1,))}
    costs = {
        "asvit_deit_tiny": (5_717_419, 1.2584),
        "asvit_deit_small": (22_050_667, 4.6083),
        "asvit_lvvit_small": (26_151_827, 6.5189),
        "asvit_lvvit_medium": (55_830_547, 12.6359),
    }


def pruning(form, dtype=torch.float64, depth=12, **kwargs):
    """A model with thresholds that keep about half of the tokens at each stage, for images of 160 x 128."""
    model = build(TINY, form=form, depth=depth, **kwargs).to(dtype)
    with torch.no_grad():
        for threshold, value in zip(model.reducer.thresholds, (0.01223, 0.02038, 0.03078)):
            threshold.fill_(value)
    return model


@pytest.fixture(scope="module")
def images():
    return image((160, 128), batch=5).double()


def kept(model, x):
    """The remaining patches of each image after each stage, by their index in the image."""
    x, state = model.begin(x)
    found = []
    for block in model.blocks:
        x = model.run_unit(block, x, state)
        if state.depth - 1 in model.reducer.blocks:
            if state.lengths is not None:
                whole = state.full.shape[0] // len(state.lengths)
                places = [part % whole for part in state.place.split(state.lengths)]
            else:
                places = [
                    row.nonzero().flatten() for row in (state.map >= 0 if state.keep is None else state.keep > 0.5)
                ]
            assert all(row[0] == 0 for row in places), "a class token was dropped"
            found.append([(row[1:] - 1).tolist() for row in places])
    return found


class TestOfficial:
    @pytest.mark.parametrize("form", ["packed", "masked"])
    @pytest.mark.parametrize("path", packs("asvit"), ids=lambda path: path.stem)
    def test_golden(self, path, form):
        pack = Pack(path)
        model = bare(f"asvit_{pack.meta['variant']}", form=form).double()
        assert sum(p.numel() for p in model.parameters()) == pack.meta["parameters"]
        # The official run had float32 weights and images, and float64 arithmetic.
        weights = {name: value.float().double() for name, value in pack.weights().items()}
        model.load_state_dict(asvit.checkpoint_filter_fn({"model": weights}, model), strict=True)
        for case in pack.meta["cases"]:
            x = pack.image(case).float().double()
            with torch.no_grad():
                # With masks, all keys share a weight of 1e-6.
                limit = 1e-10 if form == "packed" else 1e-4
                torch.testing.assert_close(model(x), pack.logits(case), rtol=0, atol=limit)
                before = list(range(196))
                for i, ((ours,), count) in enumerate(zip(kept(model, x), case["kept"])):
                    # The pack's indices count the patches that remained after the stage before.
                    official = [before[j] for j in pack.arrays[f"224x224.kept{i}"]]
                    assert len(official) == count
                    assert ours == official
                    before = official

    @pytest.mark.long
    def test_plain_vits_load(self):
        """With thresholds that drop nothing, the model equals DeiT; without stages it equals DeiT to the bit."""
        deit = build("deit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)
        model = timm.create_model(TINY).eval()
        model.load_state_dict(asvit.checkpoint_filter_fn(deit.state_dict(), model), strict=True)
        x = image((97, 131))
        with torch.no_grad():
            for threshold in model.reducer.thresholds:
                threshold.fill_(-1.0)
            torch.testing.assert_close(model(x), deit(x), rtol=1e-5, atol=1e-5)
            idle = timm.create_model(TINY, blocks=()).eval()
            idle.load_state_dict(asvit.checkpoint_filter_fn(deit.state_dict(), idle), strict=True)
            assert torch.equal(idle(x), deit(x))
            assert torch.equal(idle.forward_features(x), deit.forward_features(x))


class TestPruning:
    def test_score_by_hand(self):
        context = torch.tensor([[[[9.0], [3.0], [1.0]], [[9.0], [1.0], [1.0]]]])  # norms of two heads
        row = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]])
        found = asvit.token_scores(context, row)
        torch.testing.assert_close(found[0, 1:], torch.tensor([0.275, 0.4]))

    def test_masked_weights_by_hand(self):
        """A dropped key gets a share of epsilon only, except from itself; it counts in the maximum of the softmax."""
        query = torch.ones(1, 1, 2, 1, dtype=torch.float64)
        key = torch.tensor([[[[0.0], [5.0]]]], dtype=torch.float64)
        keep = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        out, row = asvit.masked_attention(query, key, torch.eye(2, dtype=torch.float64)[None, None, :, :1], keep)
        e, part = torch.exp(torch.tensor(-5.0, dtype=torch.float64)).item(), 5e-7
        wanted = torch.tensor([(e + part) / (e + 1e-6), part / (e + 1e-6)], dtype=torch.float64)
        torch.testing.assert_close(row[0, 0], wanted)
        torch.testing.assert_close(out[0, 0, 1, 0], torch.tensor((e + part) / (e + 1 + 1e-6), dtype=torch.float64))

    @pytest.mark.long
    def test_a_batch_is_its_images(self, images):
        """With packed tokens, each image in a batch keeps the same tokens as alone, and gives the same outputs."""
        model = pruning("packed")
        with torch.no_grad():
            together, maps = model.forward_intermediates(images)
            logits, sets = model(images), kept(model, images)
            assert len({len(row) for row in sets[0]}) > 1, "all images keep the same number: this proves nothing"
            for i in range(len(images)):
                alone = images[i : i + 1]
                torch.testing.assert_close(logits[i : i + 1], model(alone), rtol=0, atol=1e-10)
                features, own = model.forward_intermediates(alone)
                torch.testing.assert_close(together[i : i + 1], features, rtol=0, atol=1e-10)
                for found, wanted in zip(maps, own):
                    torch.testing.assert_close(found[i : i + 1], wanted, rtol=0, atol=1e-10)
                assert [stage[i] for stage in sets] == [stage[0] for stage in kept(model, alone)]

    @pytest.mark.long
    def test_packed_is_masked(self, images):
        """Both forms keep the same tokens at every stage; outputs differ by the masked softmax's epsilon only."""
        packed, masked = pruning("packed"), pruning("masked")
        with torch.no_grad():
            sets = kept(packed, images)
            assert sets == kept(masked, images)
            assert all(0 < len(row) < 80 for stage in sets for row in stage)
            for later, earlier in zip(sets[1:], sets):
                assert all(set(a) <= set(b) for a, b in zip(later, earlier))
            torch.testing.assert_close(packed(images), masked(images), rtol=1e-4, atol=1e-4)
            for found, wanted in zip(
                *(m.forward_intermediates(images, intermediates_only=True) for m in (packed, masked))
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)

    def test_dropped_positions_keep_their_features(self, images):
        """Positions are copied; other modes update them."""
        model = pruning("packed")
        model.restore = "copy"
        with torch.no_grad():
            maps = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
            sets = kept(model, images)
            for stage, first in zip(model.reducer.blocks, sets):
                for i, row in enumerate(first):
                    before, after = (maps[block][i].flatten(0, 1) for block in (stage - 1, 11))
                    same = (before == after).all(-1).nonzero().flatten().tolist()
                    assert same == sorted(set(range(80)) - set(row))

    @pytest.mark.long
    @pytest.mark.parametrize("form", ["masked", "packed", "fixed"])
    @torch.no_grad()
    def test_dropped_positions_are_updated(self, images, form):
        """In maps, a dropped token gets the mean update of the five kept tokens that were most similar to it."""
        model = pruning(form, **(dict(keep=(0.5, 0.25, 0.125)) if form == "fixed" else {}))
        copies = copy.deepcopy(model)
        copies.restore = "copy"
        found, own = (
            [y.flatten(1, 2) for y in m.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)]
            for m in (model, copies)
        )
        sets = kept(model, images)
        for i in range(len(images)):
            wanted = own[11][i].clone()
            for stage, block in reversed(list(enumerate(model.reducer.blocks))):
                before = own[block - 1][i]
                update, unit = wanted - before, torch.nn.functional.normalize(before, dim=-1)
                left = torch.tensor(sets[stage][i], dtype=torch.long)
                for position in set(range(80)) - set(sets[stage][i]):
                    near = left[(unit[left] @ unit[position]).topk(min(5, len(left))).indices]
                    wanted[position] = before[position] + update[near].sum(0) / max(1, len(near))
            torch.testing.assert_close(found[11][i], wanted)

    @pytest.mark.long
    def test_every_patch_may_go(self, images):
        for form in ("packed", "masked"):
            model = pruning(form)
            with torch.no_grad():
                for threshold in model.reducer.thresholds:
                    threshold.fill_(2.0)
                assert kept(model, images) == [[[]] * 5] * 3
                out = model(images)
                assert out.isfinite().all()

    @pytest.mark.long
    def test_fixed_keeps_the_best(self, images):
        """The fixed form equals the packed form with thresholds that keep the same number of tokens."""
        model = pruning("fixed", keep=(0.5, 0.25, 0.125))
        packed = pruning("packed")
        with torch.no_grad():
            sets = kept(model, images)
            assert [{len(row) for row in stage} for stage in sets] == [{40}, {20}, {10}]
            assert torch.equal(model.forward_features(images)[:, :1].isfinite().all(), torch.tensor(True))
            # Set thresholds of the packed form between two scores, so that an image keeps the same number of tokens.
            x, state = packed.begin(images[:1])
            for block in packed.blocks:
                if state.depth in packed.reducer.blocks:
                    stage = packed.reducer.blocks.index(state.depth)
                    score = state.score.flatten()[1:].sort(descending=True).values
                    count = (40, 20, 10)[stage]
                    packed.reducer.thresholds[stage].fill_(((score[count - 1] + score[count]) / 2).item())
                x = packed.run_unit(block, x, state)
            torch.testing.assert_close(packed(images[:1]), model(images[:1]), rtol=0, atol=1e-10)

    def test_thresholds_learn(self, images):
        """A loss on the number of kept tokens raises thresholds; tokens that are already dropped contribute, too."""
        model = pruning("auto").train()
        with torch.no_grad():
            flat, other = model.begin(images)
            for block in model.blocks[:4]:
                flat = model.run_unit(block, flat, other)
            near = other.score[:, 1:].flatten().sort().values[200]
            model.reducer.thresholds[0].fill_(near + 1e-5)
        x, state = model.begin(images)
        for block in model.blocks[:5]:
            x = model.run_unit(block, x, state)
        assert set(state.keep.detach().round(decimals=6).unique().tolist()) == {0.0, 1.0}
        state.keep.sum().backward()
        assert model.reducer.thresholds[0].grad < 0

    def test_gradients_of_masked_attention(self):
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64, generator=generator).unbind()
        keep = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (q, k, v, keep)]
        # The maximum affects only rounding, so its gradient is 0.
        assert torch.autograd.gradcheck(asvit.masked_attention, inputs, atol=1e-4)

    def test_auto(self, images):
        model = pruning("auto")
        assert model.reducer.form_of(images) == "masked"
        with torch.no_grad():
            assert model.reducer.form_of(images) == "packed"
            assert model.train().reducer.form_of(images) == "masked"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "ragged"}, "form must be one of auto, masked, packed, fixed, got 'ragged'"),
            ({"blocks": (0, 4)}, "stages begin at block 1"),
            ({"form": "fixed", "keep": (0.5,)}, "a part of 0 to 1 for each of 3 stages"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(InputError, match=message):
            timm.create_model(TINY, device="meta", **options)


class TestLVViT:
    """The second host. No official output exists here, so parts are compared with their definitions."""

    @pytest.fixture(scope="class")
    def model(self):
        model = build("asvit_lvvit_small", form="packed", depth=5, blocks=(2, 3, 4), num_classes=7).double()
        with torch.no_grad():
            for threshold, value in zip(model.reducer.thresholds, (0.0122, 0.0165, 0.022)):
                threshold.fill_(value)
        return model

    def test_official_names(self):
        """The filter takes all names and shapes of the authors' state dict."""
        model = timm.create_model("asvit_lvvit_small", device="meta")
        official = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
        for i, chans in ((1, (3, 7)), (2, (64, 3)), (3, (64, 3))):
            official[f"patch_embed.conv{i}.weight"] = (64, chans[0], chans[1], chans[1])
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                official[f"patch_embed.bn{i}.{leaf}"] = (64,)
            official[f"patch_embed.bn{i}.num_batches_tracked"] = ()
        official |= {"patch_embed.proj.weight": (384, 64, 8, 8), "patch_embed.proj.bias": (384,)}
        for i in range(16):
            for name, shape in {
                **{f"norm{k}.{leaf}": (384,) for k in (1, 2) for leaf in ("weight", "bias")},
                "attn.qkv.weight": (1152, 384),
                "attn.proj.weight": (384, 384),
                "attn.proj.bias": (384,),
                "mlp.fc1.weight": (1152, 384),
                "mlp.fc1.bias": (1152,),
                "mlp.fc2.weight": (384, 1152),
                "mlp.fc2.bias": (384,),
            }.items():
                official[f"blocks.{i}.{name}"] = shape
        for name in ("norm", "head", "aux_head"):
            official |= {f"{name}.weight": (384,) if name == "norm" else (1000, 384)}
            official |= {f"{name}.bias": (384,) if name == "norm" else (1000,)}
        official |= {f"score_predictor.{i}.keep_threshold": () for i in range(3)}
        checkpoint = {"model": {name: torch.empty(shape, device="meta") for name, shape in official.items()}}
        found = asvit.checkpoint_filter_fn(checkpoint, model)
        wanted = model.state_dict()
        assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in wanted.items()}

    @pytest.mark.long
    @torch.no_grad()
    def test_logits_are_of_kept_patches(self, model, images):
        """Logits are the class token's logits, plus half of the maximum over the remaining patches' logits."""
        features, logits = model.forward_features(images), model(images)
        sets = kept(model, images)[-1]
        assert any(0 < len(row) < 80 for row in sets)
        whole, state = model.begin(images)
        for block in model.blocks:
            whole = model.run_unit(block, whole, state)
        tokens = model.norm(model.reducer.restored(whole, state, "copy"))
        for i, row in enumerate(sets):
            patches = tokens[i, 1:][row] if row else tokens[i, :1]
            wanted = model.head.fc(tokens[i, 0]) + 0.5 * model.head.aux(patches).amax(0)
            torch.testing.assert_close(logits[i], wanted)
        assert features.shape == (5, 81, 384)

    @pytest.mark.long
    @torch.no_grad()
    def test_a_batch_is_its_images(self, model, images):
        logits = model(images)
        for i in range(len(images)):
            torch.testing.assert_close(logits[i : i + 1], model(images[i : i + 1]), rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_a_block_adds_halves(self, model):
        x = torch.randn(1, 5, 384, dtype=torch.float64)
        block = model.blocks[0]
        middle = x + block.attn(block.norm1(x)) / 2
        torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)) / 2)

    def test_numbers(self):
        """Any size runs, every parameter gets a gradient, and the classifier can be replaced."""
        model = build("asvit_lvvit_small", depth=2, blocks=(1,), drop_path_rate=0.1)
        model(image((97, 131))).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.reset_classifier(4)
        assert model.head.aux.out_features == 4
        assert model(image((64, 96))).shape == (1, 4)
        model.reset_classifier(0)
        assert model(image((64, 96))).shape == (1, 384)
        maps = model.forward_intermediates(image((97, 131)), intermediates_only=True)
        assert [tuple(found.shape) for found in maps] == [(1, 384, 7, 9)] * 2


class TestExport:
    @pytest.mark.long
    @pytest.mark.parametrize("form", ["fixed", pytest.param("masked", marks=pytest.mark.slow)])
    def test_onnx(self, form, tmp_path):
        onnx_export = pytest.importorskip("terrazzo.tools.export.formats.onnx", reason="needs the extra 'export'")
        model = pruning(form, torch.float32, depth=2, blocks=(1,), keep=(0.5,))
        report = onnx_export.export_onnx(model, image((160, 128)), tmp_path / "model.onnx", dynamic=("batch",))
        assert report.passed, report
        assert report.worst <= 1e-4

"""What every registered backbone must keep; a new family inherits all of it in three lines.

    class TestFamily(BackboneContract):
        representatives = ("family_tiny",)
        costs = {"family_tiny": (28_288_354, 4.491), ...}

`costs` holds every variant's parameters and G multiply-adds at its default size. Structure is checked for every variant
on the meta device; numbers for the representatives, and under `-m slow` for every variant. What the family cannot do of
what tests/capabilities.py tries, it says with the words of the failure: `refused = {"onnx dynamic hw": "..."}`.
A family whose authors published no weights, `reconstructed = True`, names none and says so, in its docstring, its
configurations and its card. `untrained` are variants that alone have no weights.
`shallow` holds, by representative, arguments that leave a block of each kind, for what takes minutes to compile or
export.
"""

import copy
import fnmatch
import math
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
from capabilities import CapabilityContract
from module_contract import CHECKS
from seeded import build, image
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters, group_with_matcher

import terrazzo
from terrazzo.backbones._weights import RECONSTRUCTED
from terrazzo.tools import cards, results

SIZES = ((32, 32), (97, 131), (64, 96))  # the smallest, odd and non-square, plain
MAX_SIDE = 96  # of the costlier checks


def output_and_gradients(run, model, x):
    """What `run` makes of x, and the gradient of each of the model's parameters that gets one, by name."""
    model.zero_grad()
    out = run(x)
    out.square().mean().backward()
    return out.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


class BackboneContract(CapabilityContract):
    costs: dict[str, tuple[int, float]] = {}
    reconstructed = False
    untrained: tuple[str, ...] = ()

    def pytest_generate_tests(self, metafunc):
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", list(self.costs))
        for fixture, quick in (("name", self.representatives), ("example", self.representatives[:1])):
            if fixture in metafunc.fixturenames:
                models = [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in self.costs]
                metafunc.parametrize(fixture, models, scope="class")

    # Structure, every variant, on the meta device.

    def test_registered_and_says_where_it_comes_from(self, variant):
        cfg = timm.models.get_pretrained_cfg(variant)
        assert timm.is_model(variant)
        assert cfg.origin_url
        assert cfg.paper_ids
        assert "top-1" in " ".join(cfg.notes), "the published accuracy is not named"
        by_hand = "weights are to be fetched by hand from" in (cfg.description or "")
        published = not self.reconstructed and variant not in self.untrained
        assert bool(cfg.has_weights or by_hand) == published
        assert bool(cfg.license) == published, "the licence is that of the weights"
        assert (cfg.description == RECONSTRUCTED) == self.reconstructed

    def test_a_reconstruction_says_so(self, variant):
        module = sys.modules[timm.models.model_entrypoint(variant).__module__]
        card = Path(terrazzo.__file__).parent / "model_cards" / f"{module.__name__.rsplit('.', 1)[-1]}.md"
        for text in (module.__doc__, card.read_text()):
            assert (RECONSTRUCTED in " ".join(text.split())) == self.reconstructed
        if self.reconstructed:
            with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {variant}"):
                timm.create_model(variant, pretrained=True, device="meta")

    def test_parameters_and_macs(self, variant):
        parameters, gmacs = self.costs[variant]
        found = cards.measure_model(variant)
        assert found[0].p50 == parameters
        assert found[1].p50 / 1e9 == pytest.approx(gmacs, rel=0.02)
        assert found == [row for row in results.read(cards.MODELS) if row.variant == variant], (
            "`terrazzo cards --count`"
        )

    def test_arguments(self, variant):
        model = timm.create_model(
            variant, num_classes=7, in_chans=5, drop_rate=0.1, drop_path_rate=0.2, global_pool="avgmax", device="meta"
        )
        assert model(torch.empty(2, 5, 64, 64, device="meta")).shape == (2, 7)
        with pytest.raises(TypeError):
            timm.create_model(variant, not_an_argument=1, device="meta")

    def test_features_only(self, variant):
        model = timm.create_model(variant, features_only=True, out_indices=(1, 2), device="meta")
        info = model.feature_info
        maps = model(torch.empty(2, 3, 97, 131, device="meta"))
        wanted = [(2, c, math.ceil(97 / r), math.ceil(131 / r)) for c, r in zip(info.channels(), info.reduction())]
        assert [tuple(m.shape) for m in maps] == wanted

    def test_group_matcher_covers_every_parameter_once(self, variant):
        model = timm.create_model(variant, device="meta")
        names = [name for name, _ in model.named_parameters()]
        for coarse in (False, True):
            layers = group_with_matcher(model.named_parameters(), model.group_matcher(coarse))
            grouped = [name for group in layers.values() for name in group]
            assert sorted(grouped) == sorted(names)
        layers = group_parameters(model, model.group_matcher(), reverse=True)
        unmatched = {name for name in names if layers[name] == max(layers.values())}
        assert not any(name.startswith(("stem", model.units_name)) for name in unmatched), unmatched
        assert layers[names[0]] == 0, "the stem is not the first group"

    def test_no_weight_decay_names_parameters(self, variant):
        model = timm.create_model(variant, device="meta")
        names = [name for name, _ in model.named_parameters()]
        assert all(any(fnmatch.fnmatch(name, pattern) for name in names) for pattern in model.no_weight_decay())

    def test_norm_outputs(self, variant):
        model = timm.create_model(variant, features_only=True, norm_outputs=True, device="meta")
        kept = {name.split(".")[1] for name in model.state_dict() if name.split(".")[1].startswith("norm")}
        assert len(kept) == len(model.out_indices)
        assert len(model(torch.empty(1, 3, 64, 64, device="meta"))) == len(model.out_indices)

    # Numbers.

    def test_any_size(self, name):
        model = build(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        info = FeatureInfo(model.feature_info, len(model.feature_info))
        first = model(image((64, 96)))
        for size in SIZES:
            x = image(size)
            out, maps = model.forward_intermediates(x)
            assert len(maps) == len(info.channels())
            for found, channels, reduction in zip(maps, info.channels(), info.reduction()):
                wanted = (1, channels, math.ceil(size[0] / reduction), math.ceil(size[1] / reduction))
                assert tuple(found.shape) == wanted
                assert found.isfinite().all()
            torch.testing.assert_close(model.forward_head(out), model(x))
        assert torch.equal(model(image((64, 96))), first), "another size changed what the model computes"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_batch_is_independent(self, name):
        model = build(name)
        x = image((64, 96), batch=3)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)

    def test_intermediates_agree(self, name):
        model = build(name)
        x = image((70, 64))
        with torch.no_grad():
            _, maps = model.forward_intermediates(x)
            for i in range(len(maps)):
                (early,) = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
                torch.testing.assert_close(early, maps[i])
            channels_last = model.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)
            torch.testing.assert_close(channels_last[0].permute(0, 3, 1, 2), maps[-1])
            pruned = copy.deepcopy(model)
            kept = pruned.prune_intermediate_layers([1], prune_norm=True)
            (tap,) = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
            torch.testing.assert_close(tap, maps[1])
            wrapped = timm.create_model(name, features_only=True, out_indices=(0, 2))
            wrapped.model.load_state_dict(model.state_dict(), strict=False)
            for found, wanted in zip(wrapped.eval()(x), (maps[0], maps[2])):
                torch.testing.assert_close(found, wanted)

    def test_every_parameter_learns_and_checkpointing_changes_nothing(self, name):
        model = build(name)
        x = image((64, 96), batch=2)
        out, plain = output_and_gradients(model, model, x)
        missing = {key for key, _ in model.named_parameters()} - plain.keys()
        assert not missing, f"no gradient: {missing}"
        assert all(value.isfinite().all() for value in plain.values())
        model.set_grad_checkpointing()
        out_again, checkpointed = output_and_gradients(model, model, x)
        torch.testing.assert_close(out_again, out)
        for key, value in plain.items():
            torch.testing.assert_close(checkpointed[key], value, msg=lambda text, key=key: f"{key}: {text}")

    @pytest.mark.parametrize("check", CHECKS)
    def test_modules_are_called(self, example, check):
        CHECKS[check](self.shallow_model(example))

    def test_drop_path_trains(self, name):
        model = build(name, drop_path_rate=0.5, drop_rate=0.1, num_classes=4).train()
        x = image((64, 64), batch=2)
        assert not torch.equal(model(x), model(x))
        model(x).sum().backward()

    def test_classifier(self, name):
        model = build(name)
        x = image((64, 64))
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(5)
        assert model(x).shape == (1, 5)
        assert model.get_classifier().out_features == 5
        model.reset_classifier(0)
        assert model(x).shape == (1, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape

    def test_copies(self, name):
        model = build(name)
        x = image((64, 64))
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
        again = timm.create_model(name).eval()
        again.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(again(x), wanted)

    def test_channels_last(self, name):
        model = build(name)
        x = image((64, 96))
        wanted = model(x)
        out = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(self, name, dtype):
        model = build(name)
        with torch.autocast("cpu", dtype):
            out = model(image((64, 96)))
        out.float().square().mean().backward()
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.slow  # a quarter of a minute each
    def test_compiled_gradients(self, name):
        """Of images of any size, from one graph."""
        torch._dynamo.reset()
        model = self.shallow_model(name)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((64, 96), (96, 70)):
            x = image(size)
            (_, wanted), (_, found) = (output_and_gradients(form, model, x) for form in (model, compiled))
            scale = max(float(grad.abs().max()) for grad in wanted.values())
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * scale)

    @pytest.mark.slow  # ONNX files are made from such programs
    def test_export(self, name):
        torch._dynamo.reset()  # a refused export with open sizes leaves them open
        model = self.shallow_model(name)
        x = image((64, MAX_SIDE))
        program = torch.export.export(model, (x,), strict=True)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
        ours = {node.target for node in program.graph.nodes if "terrazzo" in str(node.target)}
        assert not ours, f"an exported graph must hold standard operations only, found {ours}"

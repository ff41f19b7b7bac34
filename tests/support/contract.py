"""The contract of every registered backbone; a new family inherits it in three lines.

    class TestFamily(BackboneContract):
        representatives = ("family_tiny",)
        costs = {"family_tiny": (28_288_354, 4.491), ...}

`costs` holds every variant's parameters and G multiply-adds at its default size. Tests of structure run on the meta
device; cheap tests run on every variant. Tests of numbers run on the representatives, and with `-m slow` on every
variant. `refused` names the tests of tests/support/capabilities.py that the family fails, with the text of the error:
`refused = {"onnx dynamic hw": "..."}`. A family without published weights sets `reconstructed = True`, and says so in
its docstring, its configurations and its card. `untrained` holds single variants without weights. `cut_gradient` says
that a part of the family's computation has no gradient by definition, so gradients differ from slopes. `shallow` holds,
by representative, arguments that keep one block of each kind, for tests that would take minutes to compile or export.
`operators_of` names another family whose exported files have this family's kinds of operators. `OTHERS` and the ONNX
file of the classifier are tested on that family; on this family these tests are slow tests, which ran for its card, and
the ONNX file holds features.
"""

import contextlib
import copy
import fnmatch
import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters, group_with_matcher
from torch.nn.attention import SDPBackend, sdpa_kernel

import terrazzo
from support.capabilities import CapabilityContract
from support.module_contract import CHECKS
from support.seeded import bare, build, image, whole
from terrazzo.backbones._plain import Plain
from terrazzo.backbones._weights import RECONSTRUCTED, _Uninitialised
from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.reports import cards

SIZES = ((32, 32), (97, 131), (64, 96))  # the smallest size, an odd and non-square size, a plain size
MAX_SIDE = 96  # for costly checks
MODEL_ROWS = results.read(cards.MODELS)
SAMPLED = (
    "test_features_only",
    "test_group_matcher_covers_every_parameter_once",
    "test_configuration_names_what_fits_classes_and_channels",
    "test_no_weight_decay_names_parameters",
)
"""Checks of a variant's structure that run on the representatives and the largest variant; on others they are slow."""
COUNTED = ("test_arguments", "test_norm_outputs", "test_parameters_and_macs")
"""Checks that take longer for larger variants, and run on the representatives; on others they are slow. The largest
variant's forward pass is in `test_features_only`."""
FIRST = ("test_compile", "test_hub", "test_autocast", "test_traced", "test_older_onnx_exporter", "test_poolings")
"""Costly checks that run on the first representative; on other models they are slow."""
OTHERS = ("test_openvino", "test_fp16", "test_int8", "test_compile", "test_forward_mode")
"""Costly checks that are slow where `operators_of` is set: that family has them, and ONNX files trace the same code."""


def output_and_gradients(run, model, x):
    """The result of `run` on x, and the gradients of the model's parameters, by name, where they exist."""
    model.zero_grad()
    out = run(x)
    out.square().mean().backward()
    return out.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def shapes_of(model):
    return {name: value.shape for name, value in model.state_dict().items()}


class BackboneContract(CapabilityContract):
    costs: dict[str, tuple[int, float]] = {}
    reconstructed = False
    untrained: tuple[str, ...] = ()
    cut_gradient = False

    def pytest_generate_tests(self, metafunc):
        if "variant" in metafunc.fixturenames:
            check = metafunc.function.__name__
            quick = {*self.representatives}
            if check not in COUNTED:
                quick.add(max(self.costs, key=self.costs.get))
            every = check not in (*SAMPLED, *COUNTED)
            models = [x if every or x in quick else pytest.param(x, marks=pytest.mark.slow) for x in self.costs]
            metafunc.parametrize("variant", models)
        first = metafunc.function.__name__ in FIRST
        for fixture, quick in (
            ("name", self.representatives[: 1 if first else None]),
            ("example", self.representatives[:1]),
        ):
            if fixture in metafunc.fixturenames:
                if self.operators_of and metafunc.function.__name__ in OTHERS:
                    quick = ()
                models = [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in self.costs]
                metafunc.parametrize(fixture, models, scope="class")

    # Structure: every variant, on the meta device.

    def test_registered_and_says_where_it_comes_from(self, variant):
        cfg = timm.models.get_pretrained_cfg(variant)
        assert timm.is_model(variant)
        assert cfg.origin_url
        assert cfg.paper_ids
        assert "top-1" in " ".join(cfg.notes), "the published accuracy is not named"
        by_hand = "weights must be fetched by hand from" in (cfg.description or "")
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

    def test_parameters(self, variant):
        wanted = next(row.p50 for row in MODEL_ROWS if (row.variant, row.metric) == (variant, "parameters"))
        model = timm.create_model(variant, device="meta")
        assert self.costs[variant][0] == wanted == sum(p.numel() for p in model.parameters())

    def test_parameters_and_macs(self, variant):
        parameters, gmacs = self.costs[variant]
        found = cards.measure_model(variant)
        assert found[0].p50 == parameters
        assert found[1].p50 / 1e9 == pytest.approx(gmacs, rel=0.02)
        assert found == [row for row in MODEL_ROWS if row.variant == variant], "`terrazzo cards --count`"

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

    def test_configuration_names_what_fits_classes_and_channels(self, variant):
        """For other numbers of classes or channels, timm leaves out the classifier and adapts the stem."""

        def shapes(**kwargs):
            state_dict = timm.create_model(variant, device="meta", **kwargs).state_dict()
            return {(name, value.shape) for name, value in state_dict.items()}

        cfg, plain = timm.models.get_pretrained_cfg(variant), shapes()
        classifiers = [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier
        wanted = {f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")}
        assert {name for name, _ in shapes(num_classes=7) - plain} == wanted
        assert {name for name, _ in shapes(in_chans=5) - plain} == {f"{cfg.first_conv}.weight"}

    def test_norm_outputs(self, variant):
        model = timm.create_model(variant, features_only=True, norm_outputs=True, device="meta")
        kept = {name.split(".")[1] for name in model.state_dict() if name.split(".")[1].startswith("norm")}
        assert len(kept) == len(model.out_indices)
        assert len(model(torch.empty(1, 3, 64, 64, device="meta"))) == len(model.out_indices)

    # Numbers.

    def test_any_size(self, name):
        model = whole(name)
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
        assert torch.equal(model(image((64, 96))), first), "an image of another size changed the model"
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_batch_is_independent(self, name):
        model = whole(name)
        x = image((64, 96), batch=3)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)

    def test_output_stride(self, example):
        """The last stages keep the size of their map, with the same parameters, or the family refuses."""

        def features(**options):
            with _Uninitialised():
                return timm.create_model(example, features_only=True, device="meta", **options)

        if not getattr(timm.models.model_entrypoint(example).__annotations__["return"], "dilates", False):
            with pytest.raises(InputError, match="output_stride"):
                features(output_stride=16)
            return
        plain, x = features(), torch.empty(2, 3, 97, 131, device="meta")
        for stride in (8, 16):
            model = features(output_stride=stride)
            assert shapes_of(model) == shapes_of(plain)
            channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
            assert reductions == [min(x, stride) for x in plain.feature_info.reduction()]
            sizes = [(2, c, math.ceil(97 / r), math.ceil(131 / r)) for c, r in zip(channels, reductions)]
            assert [tuple(found.shape) for found in model(x)] == sizes
        with pytest.raises(InputError, match="output_stride must be 8, 16 or 32, got 4"):
            features(output_stride=4)

    def test_pyramid_of_a_plain_model(self, example):
        """A model with one stride gives strides 4 to 32 behind its last block; a pyramid refuses."""
        plain = issubclass(timm.models.model_entrypoint(example).__annotations__["return"], Plain)
        with _Uninitialised(), contextlib.nullcontext() if plain else pytest.raises(InputError, match="pyramid=True"):
            model = timm.create_model(example, features_only=True, pyramid=True, device="meta")
            assert model.feature_info.reduction() == [4, 8, 16, 32]
            maps = model(torch.empty(2, 3, 97, 131, device="meta"))
            assert [tuple(x.shape) for x in maps] == [(2, 256, -(-97 // r), -(-131 // r)) for r in (4, 8, 16, 32)]

    def test_empty_batch(self, example):
        """An empty batch gives an empty output, and gradients of 0."""
        model, x = self.shallow_model(example), torch.empty(0, 3, 64, 64)
        out, grads = output_and_gradients(lambda x: model(x).sum(0), model, x)
        assert model(x).shape == (0, model.num_classes)
        assert not any(grad.any() for grad in (out, *grads.values()))
        arguments = dict(features_only=True, out_indices=(0,), **self.shallow.get(example, {}))
        features = timm.create_model(example, **arguments).eval()
        full = features(torch.zeros(1, 3, 64, 64))
        assert [found.shape for found in features(x)] == [(0, *wanted.shape[1:]) for wanted in full]

    @pytest.mark.long
    def test_forward_mode(self, example):
        """Tangents equal the slopes of the output, and agree with reverse-mode gradients."""
        model = self.shallow_model(example).double()
        generator = torch.Generator().manual_seed(2)
        x = image((32, 32)).double()
        tangent = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention kernels have no forward mode
            out, found = torch.func.jvp(model, (x,), (tangent,))
        weight = torch.randn(out.shape, dtype=x.dtype, generator=generator)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(model(x), x, weight)
        torch.testing.assert_close((found * weight).sum(), (gradient * tangent).sum(), rtol=1e-8, atol=0)
        if not self.cut_gradient:
            with torch.no_grad():
                slope = (model(x + 1e-6 * tangent) - model(x - 1e-6 * tangent)) / 2e-6
            rounding = 1e-9 * float(out.detach().abs().max())  # of the difference of two outputs, over 2e-6
            torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5 * float(slope.abs().max()) + rounding)

    def test_intermediates_agree(self, name):
        model = whole(name)
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
            wrapped = bare(name, features_only=True, out_indices=(0, 2))
            wrapped.model.load_state_dict(model.state_dict(), strict=False)
            for found, wanted in zip(wrapped(x), (maps[0], maps[2])):
                torch.testing.assert_close(found, wanted)

    def test_every_parameter_learns_and_checkpointing_changes_nothing(self, name):
        model = whole(name)
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
        model = whole(name)
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

    def test_layout_of_features(self, example):
        """`output_fmt` is the layout of `forward_features`, a view of the same numbers; families of tokens refuse."""
        model = self.shallow_model(example)
        features, x = model.forward_features(image((64, 96))), image((64, 96))
        if features.dim() == 3:
            with pytest.raises(InputError, match=f"{example} gives tokens"):
                self.shallow_model(example, output_fmt="NCHW")
            return
        other = "NCHW" if model.output_fmt == "NHWC" else "NHWC"
        turned = self.shallow_model(example, output_fmt=other)
        assert turned.output_fmt == other
        found = turned.forward_features(x)
        assert torch.equal(found.permute(0, 2, 3, 1) if other == "NCHW" else found.permute(0, 3, 1, 2), features)
        assert found.shape[1 if other == "NCHW" else 3] == model.num_features
        assert torch.equal(turned(x), model(x))
        again, maps = turned.forward_intermediates(x)
        assert torch.equal(again, found)
        assert torch.equal(maps[-1], model.forward_intermediates(x)[1][-1])
        turned.reset_classifier(0, "")
        assert turned(x).shape == turned.forward_head(found, pre_logits=True).shape
        assert turned(x).dim() == 4
        with pytest.raises(InputError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
            self.shallow_model(example, output_fmt="NLC")

    def test_poolings(self, name):
        """`head_hidden_size` is the classifier's input width, in a new model and after a reset of its head."""
        options = self.shallow.get(name, {})
        model = timm.create_model(name, **options)
        features = model.forward_features(image((64, 64)))
        for pooling in model.head.poolings:
            new = timm.create_model(name, global_pool=pooling, num_classes=7, **options).eval()
            model.reset_classifier(7, pooling)
            for found in (new, model):
                last = found.forward_head(features, pre_logits=True)
                out = found.forward_head(features)
                if pooling:
                    assert last.shape == (1, found.head_hidden_size)
                    assert out.shape == (1, 7)
                else:
                    assert found.head_hidden_size in (last.shape[1], last.shape[-1])
                    assert out.numel() * found.head_hidden_size == last.numel() * 7
        for unknown in ("mean", "AVG", 3):
            with pytest.raises(InputError, match="global_pool must be one of"):
                self.shallow_model(name, global_pool=unknown)
        with pytest.raises(InputError, match="global_pool must be one of"):
            model.reset_classifier(7, "mean")

    def test_hub(self, name, tmp_path):
        """The files of timm's `save_for_hf` restore the model with any head."""
        heads = [
            {},
            dict(num_classes=0),
            dict(num_classes=0, global_pool=""),
            dict(in_chans=1, global_pool="catavgmax"),
        ]
        for i, kwargs in enumerate([*heads, dict(norm_outputs=True)]):
            model = self.shallow_model(name, **kwargs)
            arguments = {**self.shallow.get(name, {}), **kwargs}
            arguments.pop("num_classes", None)
            self.same_again(model, tmp_path / str(i), model_args=arguments)
        for i, arguments in enumerate([(7,), (7, "max"), (0,)]):
            model = self.shallow_model(name)
            model.reset_classifier(*arguments)
            self.same_again(model, tmp_path / f"reset{i}")
        other = timm.create_model(f"local-dir:{tmp_path / 'reset0'}", pretrained=True, num_classes=5).eval()
        assert other(image((64, 64))).shape == (1, 5)
        wanted = model.forward_features(image((64, 64)))
        torch.testing.assert_close(other.forward_features(image((64, 64))), wanted, rtol=0, atol=0)

    @staticmethod
    def same_again(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = image((64, 64), chans=model.in_chans)
        assert torch.equal(again(x), model(x))
        assert json.loads((folder / "config.json").read_text())["num_classes"] == model.num_classes

    def test_copies(self, name):
        model = self.shallow_model(name)
        x = image((64, 64))
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
        again = bare(name, **self.shallow.get(name, {}))
        again.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(again(x), wanted)

    def test_channels_last(self, name):
        model = whole(name)
        x = image((64, 96))
        wanted = model(x)
        out = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(self, name, dtype):
        model = self.shallow_model(name)
        with torch.autocast("cpu", dtype):
            out = model(image((64, 96)))
        out.float().square().mean().backward()
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.slow  # each takes 15 s
    def test_compiled_gradients(self, name):
        """One graph gives the gradients for images of any size."""
        torch._dynamo.reset()
        model = self.shallow_model(name)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((64, 96), (96, 70)):
            x = image(size)
            (_, wanted), (_, found) = (output_and_gradients(form, model, x) for form in (model, compiled))
            scale = max(float(grad.abs().max()) for grad in wanted.values())
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * scale)

    @pytest.mark.filterwarnings(
        "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:Constant folding"
    )
    def test_traced(self, name):
        """A traced model is right at its size, and holds standard operations only, so it loads without terrazzo."""
        model, x = self.shallow_model(name), image((64, 64))
        with torch.no_grad():
            traced = torch.jit.trace(model, image((64, 64), batch=2), check_trace=False)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
        kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
        assert kinds == {"aten", "prim"}

    @pytest.mark.filterwarnings(
        "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:Constant folding"
    )
    def test_older_onnx_exporter(self, name, tmp_path):
        """timm's script uses `dynamo=False`; the export of one image works for a larger batch."""
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
        model, path = self.shallow_model(name), tmp_path / "model.onnx"
        names = dict(input_names=["image"], output_names=["logits"])
        axes = dict(image={0: "batch"}, logits={0: "batch"})
        torch.onnx.export(model, (image((64, 64)),), path, dynamo=False, dynamic_axes=axes, **names)
        session = onnxruntime.InferenceSession(path)
        for batch in (1, 3):
            x = image((64, 64), batch=batch)
            (found,) = session.run(None, {"image": x.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)

    def test_open_batch_from_an_example_of_one(self, example):
        """An example of one image is refused, because torch would make a graph for a batch of 1 only."""
        torch._dynamo.reset()
        as_its_onnx_exporter = torch.fx.experimental._config.patch(backed_size_oblivious=True)
        model, shapes = self.shallow_model(example), ({0: torch.export.Dim.DYNAMIC},)
        with as_its_onnx_exporter, pytest.raises(InputError, match="2 images or more"):
            torch.export.export(model, (image((64, 64)),), dynamic_shapes=shapes, strict=False)

    @pytest.mark.slow  # ONNX files are made from these programs
    def test_export(self, name):
        torch._dynamo.reset()  # a refused export with open sizes leaves them open
        model = self.shallow_model(name)
        x = image((64, MAX_SIDE))
        program = torch.export.export(model, (x,), strict=True)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
        ours = {node.target for node in program.graph.nodes if "terrazzo" in str(node.target)}
        assert not ours, f"an exported graph must hold standard operations only, found {ours}"

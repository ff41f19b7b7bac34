"""What every restoration network can do. `tests/restoration/test_contract.py` runs it for every registered family."""

import copy
import inspect
import pickle
import re
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from support.module_contract import check_hooks
from support.restoration import SMALL_NETWORKS, WITHOUT_GRADIENT
from terrazzo import degradations, restoration
from terrazzo.backbones._names import registered_models
from terrazzo.backbones._weights import RECONSTRUCTED
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError, WeightsError
from terrazzo.restoration._model import RestorationModel
from terrazzo.restoration._reflection import lengthened
from terrazzo.restoration._registration import purpose_of
from terrazzo.tools import results
from terrazzo.tools.reports import cards

VARIANTS = registered_models(("restoration",))
"""Every registered network, to its family."""


def network(name: str, **options) -> nn.Module:
    """A small network whose parameters are all random, so that none can hide a mistake."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL_NETWORKS.get(VARIANTS[name], {}), **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def pictures(*size: int, batch: int = 1, chans: int = 3) -> Tensor:
    """(batch, chans, H, W) in 0..1, always the same."""
    return torch.rand(batch, chans, *size, generator=torch.Generator().manual_seed(1))


class RestorationContract:
    """Runs with a family's first network, `name`, small if `SMALL_NETWORKS` says how; some tests with every variant."""

    @pytest.fixture(scope="class", params=restoration.FAMILIES)
    def name(self, request) -> str:
        return next(name for name, family in VARIANTS.items() if family == request.param)

    @pytest.fixture(scope="class")
    def kept(self, name) -> nn.Module:
        return network(name)

    @pytest.fixture
    def model(self, kept) -> nn.Module:
        return copy.deepcopy(kept)

    # What is registered.

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_says_what_it_is(self, variant):
        cfg, entrypoint = timm.models.get_pretrained_cfg(variant), timm.models.model_entrypoint(variant)
        assert cfg.origin_url
        assert cfg.paper_ids
        assert cfg.license
        assert (cfg.mean, cfg.std, cfg.num_classes) == ((0, 0, 0), (1, 1, 1), 0)
        assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
        text = " ".join(sys.modules[entrypoint.__module__].__doc__.split())
        assert (RECONSTRUCTED in text) == (cfg.description == RECONSTRUCTED)
        if not (cfg.has_weights or cfg.file):
            with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {variant}"):
                timm.create_model(variant, pretrained=True, device="meta", **SMALL_NETWORKS.get(VARIANTS[variant], {}))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_counts(self, variant):
        """Parameters, upscaling and tasks are what `terrazzo list` prints."""
        stored = results.read(cards.COUNTS["restoration"])
        wanted = next(row.p50 for row in stored if (row.variant, row.metric) == (variant, "parameters"))
        model = timm.create_model(variant, device="meta")
        assert sum(p.numel() for p in model.parameters()) == wanted, "`terrazzo cards --count`"
        assert isinstance(model, RestorationModel)
        purpose = purpose_of(variant)
        assert (model.upscale, model.tasks) == purpose
        assert set(purpose.tasks) <= {kind.task for kind in degradations.KINDS.values()}
        assert purpose.tasks
        assert ("super-resolution" in purpose.tasks) == (purpose.upscale > 1)

    # Shapes.

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 35), (50, 7)], ids=str)
    def test_any_size(self, kept, size):
        """The result is that of the picture, reflected to a size that the network takes, and cut."""
        x = pictures(*size)
        out = kept(x)
        height, width = (kept.upscale * side for side in size)
        assert out.shape == (1, 3, height, width)
        assert out.isfinite().all()
        for axis in (2, 3):
            x = lengthened(x, axis, kept.multiple, kept.least_side())
        torch.testing.assert_close(out, kept(x)[:, :, :height, :width])

    @torch.no_grad()
    def test_pictures_of_a_batch_are_independent(self, kept):
        x = pictures(20, 24, batch=3)
        assert torch.equal(kept(x), kept(x)), "evaluation is random"
        torch.testing.assert_close(kept(x), torch.cat([kept(one[None]) for one in x]), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_other_channels(self, name):
        model = network(name, in_chans=1)
        assert model(pictures(16, 16, chans=1)).shape == (1, 1, 16 * model.upscale, 16 * model.upscale)

    @pytest.mark.parametrize("options", [dict(features_only=True), dict(num_classes=10)], ids=str)
    def test_gives_pictures_only(self, name, options):
        with pytest.raises(InputError, match=f"{name} gives pictures.*leave out {next(iter(options))}"):
            timm.create_model(name, **options)

    @pytest.mark.parametrize("x", [pictures(16, 16)[0], pictures(16, 16, chans=4), pictures(16, 16).int()])
    def test_refuses_what_is_no_picture(self, kept, x):
        with pytest.raises(InputError, match=r"floating tensor of images \(B, 3, H, W\)"):
            kept(x)

    # Numbers.

    @torch.no_grad()
    def test_precisions(self, model):
        """float64 gives the same, bfloat16 nearly the same, as a model or by autocast."""
        x = pictures(18, 20)
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x) - wanted).abs().max() < 0.2 * wanted.std()
        exact = copy.deepcopy(model).double()(x.double())
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact.float(), wanted, rtol=1e-4, atol=1e-4)
        narrow = model.to(torch.bfloat16)(x.bfloat16())
        assert narrow.dtype == torch.bfloat16
        assert narrow.isfinite().all()

    @torch.no_grad()
    def test_channels_last(self, model):
        x = pictures(18, 24, batch=2)
        wanted = model(x)
        found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_every_parameter_has_a_gradient_and_checkpointing_keeps_it(self, name):
        model = network(name, **self.without_chance(name)).double().train()
        x = pictures(16, 20).double().requires_grad_()
        found = []
        for again in (False, True):
            model.set_grad_checkpointing(again)
            out = model(x)
            out.square().mean().backward()
            found.append({"the picture": x.grad, **{key: p.grad for key, p in model.named_parameters()}})
            model.zero_grad()
            x.grad = None
        for key, grad in found[0].items():
            assert grad is not None, key
            assert grad.isfinite().all(), key
            assert grad.abs().sum() > 0 or WITHOUT_GRADIENT.get(VARIANTS[name], "?") in key, key
            torch.testing.assert_close(found[1][key], grad, msg=lambda text, key=key: f"{key}: {text}")

    @staticmethod
    def without_chance(name: str) -> dict[str, float]:
        """Arguments for a training that draws no random numbers."""
        arguments = inspect.signature(timm.models.model_entrypoint(name).__annotations__["return"]).parameters
        return {key: 0.0 for key in arguments if key.startswith("drop_")}

    # Modules and weights.

    def test_modules_are_called(self, model):
        """Hooks, adapters and quantisation see every layer."""
        check_hooks(model)

    @torch.no_grad()
    def test_copies(self, name, kept):
        x = pictures(18, 20)
        wanted = kept(x)
        again = timm.create_model(name, **SMALL_NETWORKS.get(VARIANTS[name], {})).eval()
        assert not torch.allclose(again(x), wanted, atol=1e-4)
        again.load_state_dict(kept.state_dict(), strict=True)
        for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), again):
            assert torch.equal(twin(x), wanted)

    @pytest.mark.parametrize("key", ["params", "params_ema", "state_dict"])
    def test_files_of_training_programs(self, name, kept, key, tmp_path):
        """BasicSR's keys and a prefix, in every way to load; averaged weights come before the others."""
        state = {f"module.{name}": value + 0.5 for name, value in kept.state_dict().items()}
        path = tmp_path / "network.pth"
        torch.save({"params": kept.state_dict(), key: state} if key == "params_ema" else {key: state}, path)
        options = SMALL_NETWORKS.get(VARIANTS[name], {})
        by_hand, by_us = copy.deepcopy(kept), copy.deepcopy(kept)
        assert not any(by_hand.load_state_dict(torch.load(path, weights_only=True)))
        load_weights(by_us, name, str(path))
        by_path = timm.create_model(name, checkpoint_path=str(path), **options)
        by_overlay = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **options)
        for model in (by_hand, by_us, by_path, by_overlay):
            for tensor, value in model.state_dict().items():
                assert torch.equal(value, state[f"module.{tensor}"]), tensor

    def test_weights_that_do_not_fit(self, model):
        state = model.state_dict()
        key = next(key for key in reversed(state) if state[key].dim() > 1)
        for words, wrong in ((f"another shape 1, such as {key}", key), ("too many 1, such as a.b", "a.b")):
            with pytest.raises(WeightsError, match=re.escape(words)):
                model.load_state_dict({"params": {**state, wrong: state[key][:1, :1]}})

    @pytest.mark.slow  # each takes 8 s
    @torch.no_grad()
    def test_compiles_without_a_break(self, kept):
        x = pictures(18, 20)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(kept, fullgraph=True, backend="eager")(x), kept(x))

    def test_layer_decay(self, model):
        """Each parameter is in a group, and groups have a first and a last."""
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert len({group["lr_scale"] for group in groups}) > 2

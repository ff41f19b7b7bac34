"""Checkpoints load with any prefix and by every function; if they do not fit, a line says why."""

import time

import pytest
import timm
import torch
from support.families import smallest
from support.seeded import bare

import terrazzo  # noqa: F401  registers the backbones
from terrazzo.backbones._weights import nearest, weights_of
from terrazzo.checkpoints.loading import load_weights
from terrazzo.errors import InputError, WeightsError

PREFIXES = ("", "model.", "encoder.", "net.", "backbone.", "module.", "_orig_mod.", "model._orig_mod.", "lit.a.b.")


def build(name, **options):
    return timm.create_model(name, device="meta", **options)


@pytest.mark.parametrize("name", smallest())
def test_prefixes_go_in_every_family(name):
    """Lightning, detectors, DistributedDataParallel and torch.compile write prefixes; other parts are ignored."""
    model = build(name)
    wanted = model.state_dict()
    for prefix in PREFIXES:
        state = {prefix + key: value for key, value in wanted.items()}
        if prefix.endswith(("model.", "encoder.", "backbone.")):
            state |= {"criterion.weight": torch.ones(2), "neck.convs.0.weight": torch.ones(2)}
        result = model.load_state_dict({"state_dict": state})
        assert result.missing_keys == result.unexpected_keys == []


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_way_in_takes_prefixes(prefix, tmp_path):
    torch.manual_seed(0)
    wanted = timm.create_model("mctf_deit_tiny").state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in wanted.items()}}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    by_filter = timm.create_model("mctf_deit_tiny", pretrained=True, pretrained_cfg_overlay={"file": path})
    loaded = timm.create_model("mctf_deit_tiny")
    load_weights(loaded, "mctf_deit_tiny", path)
    for model in (timm.create_model("mctf_deit_tiny", checkpoint_path=path), by_filter, loaded):
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_official_names_load_by_checkpoint_path(tmp_path):
    deit = timm.create_model("deit_tiny_patch16_224")
    torch.save({"model": deit.state_dict()}, tmp_path / "x.pth")
    model = timm.create_model("mctf_deit_tiny", checkpoint_path=str(tmp_path / "x.pth"))
    assert torch.equal(model.head.fc.weight, deit.head.weight)


def test_not_strict_is_as_pytorch_has_it():
    model = build("mctf_deit_tiny")
    result = model.load_state_dict({"model.x": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["model.x"]
    assert len(result.missing_keys) == len(model.state_dict())


@pytest.mark.long
@pytest.mark.parametrize(
    ("of", "into", "words"),
    [
        ("dinat_mini", "mctf_deit_tiny", "it is nearest to model 'dinat_mini'"),
        pytest.param(
            *("mambavision_t", "mambavision_t2", "it is nearest to model 'mambavision_t'"), marks=pytest.mark.slow
        ),
        pytest.param("rgt_s_x2", "mtair", "it is nearest to model 'rgt_s_x2'", marks=pytest.mark.slow),
        ("vmamba_small_s2l15", "vmamba_tiny_s2l5", "it has too many 180, such as stages.2.blocks.5"),
        ("resnet18", "mctf_deit_tiny", "no terrazzo model is similar"),
    ],
)
def test_another_models_weights_are_refused_in_a_line(of, into, words, tmp_path):
    torch.save({"model": bare(of).state_dict()}, tmp_path / "x.pth")  # names and shapes decide
    begun = time.process_time()
    with pytest.raises(WeightsError) as by_pytorch:
        timm.create_model(into, checkpoint_path=str(tmp_path / "x.pth"))
    with pytest.raises(InputError) as by_us:
        load_weights(bare(into), into, str(tmp_path / "x.pth"))
    assert time.process_time() - begun < 20
    for error in (by_pytorch, by_us):
        line = str(error.value)
        assert words in line
        assert f"does not fit model '{into}'" in line
        assert "\n" not in line
        assert len(line) < 450


def test_another_head_is_said():
    state = build("mctf_deit_tiny", num_classes=5).state_dict()
    with pytest.raises(RuntimeError, match=r"head\.fc\.weight \(5x192 and not 1000x192\).*such as num_classes"):
        build("mctf_deit_tiny").load_state_dict(state)


@pytest.mark.parametrize("content", [[1], torch.ones(2), 3, {}, {"a": 1}], ids=str)
def test_no_weights_are_one_error(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x\.pth' holds"):
        load_weights(build("mctf_deit_tiny"), "mctf_deit_tiny", str(tmp_path / "x.pth"))
    with pytest.raises(WeightsError, match="the checkpoint holds"):
        build("mctf_deit_tiny").load_state_dict(content)


def test_averaged_weights_come_first_unless_they_are_not_wanted():
    plain, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    for key in ("state_dict_ema", "model_ema", "ema", "params_ema"):
        checkpoint = {"params" if key == "params_ema" else "state_dict": plain, key: average}
        assert [weights_of(checkpoint, ema)["a"].item() for ema in (None, True, False)] == [1, 1, 0]
    checkpoint = {"state_dict": plain, "ema_state_dict": average}  # mmengine stores the average in state_dict
    assert [weights_of(checkpoint, ema)["a"].item() for ema in (None, True, False)] == [0, 1, 0]


def test_histories_are_no_weights():
    with pytest.raises(InputError, match="holds no weights"):
        weights_of({"message_hub": {"log_scalars": {"loss": {"log": torch.ones(2)}}}})


@pytest.mark.long
def test_nearest_takes_any_form():
    state = build("vmamba_tiny_s1l8", num_classes=3).state_dict()
    assert nearest({f"backbone.{key}": value for key, value in state.items()}) == "vmamba_tiny_s1l8"

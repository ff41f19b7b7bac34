"""The wrapper of timm models as OpenMMLab backbones."""

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import nn

from terrazzo.backbones.reducers import reducers
from terrazzo.errors import InputError
from terrazzo.openmmlab import Classifier, TerrazzoBackbone


def ready(model):
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("dinat_mini", (0, 1, 2, 3)),
        ("resnet18", (1, 2, 3, 4)),
        ("convnext_atto", (1, 3)),
        ("swin_tiny_patch4_window7_224", (-2, -1)),
    ],
)
def test_maps_have_the_promised_channels_and_strides(name, indices):
    backbone = ready(MODELS.build({"type": "TerrazzoBackbone", "name": name, "out_indices": indices}))
    maps = backbone(torch.rand(2, 3, 96, 64))
    assert isinstance(maps, tuple)
    assert len(maps) == len(indices)
    for feature, channels, stride in zip(maps, backbone.out_channels, backbone.strides):
        assert feature.shape == (2, channels, 96 // stride, 64 // stride)
    assert backbone.strides[-1] == 32


def test_is_found_from_mmdet_and_mmseg():
    import mmdet.registry
    import mmseg.registry

    for registry in (mmdet.registry.MODELS, mmseg.registry.MODELS):
        assert registry.get("TerrazzoBackbone") is TerrazzoBackbone


def test_odd_size():
    backbone = ready(TerrazzoBackbone("dinat_mini"))
    sizes = [tuple(feature.shape[2:]) for feature in backbone(torch.rand(1, 3, 75, 50))]
    assert sizes == [(19, 13), (10, 7), (5, 4), (3, 2)]


def test_maps_are_those_of_timm():
    torch.manual_seed(0)
    backbone = ready(TerrazzoBackbone("resnet18", out_indices=(2, 4)))
    model = ready(timm.create_model("resnet18", features_only=True, out_indices=(2, 4)))
    model.load_state_dict(backbone.model.state_dict())
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(backbone(image), model(image)):
        torch.testing.assert_close(ours, theirs)


def test_vision_transformer_takes_any_size():
    backbone = ready(TerrazzoBackbone("vit_tiny_patch16_224", out_indices=(5, 11)))
    assert [tuple(feature.shape) for feature in backbone(torch.rand(1, 3, 96, 50))] == [(1, 192, 6, 4)] * 2


@pytest.mark.long
def test_output_norms():
    assert TerrazzoBackbone("resnet18").norms is None
    assert len(TerrazzoBackbone("resnet18", norm_outputs=True).norms) == 4
    ours = TerrazzoBackbone("dinat_mini")
    assert ours.norms is None
    assert {f"norm{index}.weight" for index in range(4)} <= set(ours.model.state_dict())
    assert "norm0.weight" not in TerrazzoBackbone("dinat_mini", norm_outputs=False).model.state_dict()


def test_no_parameter_is_idle():
    backbone = TerrazzoBackbone("dinat_mini")
    sum(feature.square().mean() for feature in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "dinat_mini"])
def test_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    plain = TerrazzoBackbone(name, with_cp=False)
    thrifty = TerrazzoBackbone(name, with_cp=True)
    thrifty.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 64, 64)
    for backbone in (plain, thrifty):
        backbone.train()
        sum(feature.square().mean() for feature in backbone(image)).backward()
    for ours, theirs in zip(plain.parameters(), thrifty.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("stages", "frozen"), [(-1, ()), (0, ("conv1",)), (2, ("conv1", "layer1", "layer2"))])
def test_freezing_a_resnet(stages, frozen):
    backbone = TerrazzoBackbone("resnet18", frozen_stages=stages)
    assert backbone.train() is backbone
    for name, parameter in backbone.model.named_parameters():
        part = name.split(".")[0].replace("bn1", "conv1")
        assert parameter.requires_grad == (part not in frozen), name
    for name, module in backbone.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0].replace("bn1", "conv1") not in frozen), name
    assert not backbone.eval().model.training


def test_freezing_a_pyramid():
    backbone = TerrazzoBackbone("dinat_mini", frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, p in backbone.model.named_parameters()
        if not p.requires_grad
    }
    assert {name for name in frozen if name.startswith("stages")} == {"stages.0", "stages.1"}
    for stage in (0, 1):
        assert all(not module.training for module in backbone.model.stages[stage].modules())
    assert all(module.training for module in backbone.model.stages[2].modules())
    assert all(parameter.requires_grad for parameter in backbone.model.norm0.parameters())


def test_init_weights_leaves_the_weights_alone():
    backbone = TerrazzoBackbone("resnet18")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "dinat_mini"])
def test_loads_classification_weights(name, tmp_path):
    model = timm.create_model(name, num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    backbone = TerrazzoBackbone(name, checkpoint=str(tmp_path / "official.pth"))
    own = backbone.model.state_dict()
    shared = [key for key in own if key in model.state_dict()]
    assert len(shared) > 10
    assert all(torch.equal(own[key], model.state_dict()[key]) for key in shared)


@pytest.mark.long
def test_loads_weights_of_a_trained_detector(tmp_path):
    first = TerrazzoBackbone("dinat_mini")
    torch.nn.init.normal_(first.model.norm0.weight)
    state = {f"backbone.{key}": value for key, value in first.state_dict().items()} | {"neck.weight": torch.ones(1)}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "detector.pth")
    second = TerrazzoBackbone("dinat_mini", checkpoint=str(tmp_path / "detector.pth"))
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


def test_loads_safetensors(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("resnet18")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    backbone = TerrazzoBackbone("resnet18", checkpoint=str(tmp_path / "weights.safetensors"))
    assert torch.equal(backbone.model.conv1.weight, model.conv1.weight)


@pytest.mark.long
def test_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth.*does not fit model 'resnet34'.*lacks"):
        TerrazzoBackbone("resnet34", checkpoint=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dinat_minni"}, "did you mean dinat_mini"),
        ({"name": "resnet18", "out_indices": (5,)}, r"out_indices is \(5,\).*0 to 4"),
        ({"name": "resnet18", "out_indices": (2, 1)}, "rising order"),
        ({"name": "resnet18", "frozen_stages": 5}, "frozen_stages is 5.*-1 to 4"),
        ({"name": "dinat_mini", "frozen_stages": 5}, "frozen_stages is 5.*-1 to 4"),
        ({"name": "resnet18", "colour": 1}, "colour"),
        ({"name": "resnet18", "checkpoint": "gone.pth"}, r"gone\.pth.*does not exist"),
    ],
)
def test_errors_say_what_and_what_next(arguments, message):
    with pytest.raises(InputError, match=message):
        TerrazzoBackbone(**arguments)


VIT = dict(name="vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=3, out_indices=(0, 2))


def test_converts_and_reduces(tmp_path):
    """A file of the plain ViT's weights, or of the changed model, loads into the changed model."""
    torch.manual_seed(0)
    image, plain = torch.rand(1, 3, 96, 64), ready(TerrazzoBackbone(**VIT))
    torch.save(plain.model.state_dict(), tmp_path / "plain.pth")
    changes = dict(
        convert=[dict(mixer="hedgehog", layers=[0]), dict(mixer="hedgehog", layers=[1])],
        reduce=dict(method="mctf", r=2, criteria=(1, 0, 40), blocks=(2,)),
    )
    changed = ready(TerrazzoBackbone(**VIT, **changes, checkpoint=str(tmp_path / "plain.pth")))
    assert list(changed.model.conversion) == [0, 1]
    wanted = changed(image)
    assert [y.shape for y in wanted] == [y.shape for y in plain(image)]
    assert not torch.allclose(wanted[0], plain(image)[0])
    with torch.no_grad():
        changed.model.blocks[0].attn.mixer.query_map.mul_(2)
    wanted = changed(image)
    torch.save(changed.model.state_dict(), tmp_path / "changed.pth")
    again = ready(TerrazzoBackbone(**VIT, **changes, checkpoint=str(tmp_path / "changed.pth")))
    for found, map_ in zip(again(image), wanted):
        torch.testing.assert_close(found, map_)


@pytest.mark.parametrize("method", reducers())
def test_reducers(method):
    """Every method of `terrazzo.reduce` gives maps with every position."""
    backbone = ready(TerrazzoBackbone(**VIT, reduce=dict(method=method, blocks=(1,))))
    assert backbone.model.changes["reduce"]["method"] == method
    assert [tuple(y.shape) for y in backbone(torch.rand(1, 3, 96, 64))] == [(1, 48, 6, 4)] * 2


def test_a_checkpoint_names_its_mixers(tmp_path):
    """A file of another converted model is refused, and the line says what to write."""
    trained = TerrazzoBackbone(**VIT, convert=dict(mixer="llsa", topk=2))
    meta = {"terrazzo.changes": trained.model.changes}
    torch.save({"meta": meta, "state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    settings = dict(VIT, checkpoint=str(tmp_path / "trained.pth"))
    for convert in (None, dict(mixer="hedgehog"), dict(mixer="llsa", layers=[0])):
        with pytest.raises(InputError, match=r"pass convert=dict\(mixer='llsa', topk=2\)$"):
            TerrazzoBackbone(**settings, convert=convert)
    with pytest.raises(InputError, match=r"pass convert=dict\(mixer='llsa', topk=2\)$"):
        Classifier({key: value for key, value in settings.items() if key != "out_indices"} | dict(num_classes=2))
    again = TerrazzoBackbone(**settings, convert=dict(mixer="llsa", topk=2))
    assert again.model.changes == trained.model.changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(convert=dict(mixer="tome")), "mixer must be one of .*hedgehog"),
        (dict(convert=dict(layers=[0])), "convert=.* of model 'vit_tiny_patch16_224' does not fit: .*mixer"),
        (dict(reduce=dict(method="mctf", keep=0.5)), "options of 'mctf' are"),
    ],
)
def test_wrong_changes(changes, message):
    with pytest.raises(InputError, match=message):
        TerrazzoBackbone(**VIT, **changes)

"""Layer-wise learning rates."""

import itertools

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from terrazzo.errors import InputError
from terrazzo.openmmlab import Classifier, TerrazzoBackbone


class Detector(nn.Module):
    """A backbone with a head."""

    def __init__(self, name, **kwargs):
        super().__init__()
        self.backbone = TerrazzoBackbone(name, **kwargs)
        self.head = nn.Conv2d(self.backbone.out_channels[-1], 3, 1)


def optimizer_of(model, **paramwise):
    return build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
            "constructor": "LayerDecayOptimWrapperConstructor",
            "paramwise_cfg": paramwise,
        },
    ).optimizer


def settings_of(model, optimizer):
    """Map each parameter's name to its group, and check that it is in a single group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = group
    return found


@pytest.mark.parametrize("name", ["dinat_mini", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_covers_each_parameter_once(name):
    model = Detector(name)
    found = settings_of(model, optimizer_of(model, layer_decay=0.8))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["head.weight"]["lr"] == 1
    backbone = {name: group["lr"] for name, group in found.items() if name.startswith("backbone.")}
    assert max(backbone.values()) == pytest.approx(0.8)
    first = next(iter(backbone))
    assert backbone[first] == min(backbone.values()) < 0.8


def test_order_of_a_pyramid():
    model = Detector("dinat_mini")
    found = settings_of(model, optimizer_of(model, layer_decay=0.9))
    scales = [min(g["lr"] for n, g in found.items() if f"stages.{stage}." in n) for stage in range(4)]
    stem = [group["lr"] for name, group in found.items() if ".stem." in name]
    assert [*sorted(set(stem)), *scales] == sorted([*set(stem), *scales])
    assert len(set(scales)) == 4


def test_blocks_of_a_stage_are_layers_of_their_own():
    model = Detector("dinat_mini")
    found = settings_of(model, optimizer_of(model, layer_decay=0.9))
    blocks = len(model.backbone.model.stages[2].blocks)
    rates = [{g["lr"] for n, g in found.items() if f"stages.2.blocks.{block}." in n} for block in range(blocks)]
    assert all(len(rate) == 1 for rate in rates)
    rates = [rate.pop() for rate in rates]
    assert [later / earlier for earlier, later in itertools.pairwise(rates)] == pytest.approx([1 / 0.9] * (blocks - 1))


def test_weight_decay():
    model = Detector("dinat_mini")
    found = settings_of(model, optimizer_of(model, layer_decay=1.0))
    for name, parameter in model.named_parameters():
        undecayed = parameter.ndim <= 1 or name.endswith("rpb")
        assert found[name]["weight_decay"] == (0 if undecayed else 0.05), name


def test_head_of_a_classifier_has_scale_one():
    model = Classifier({"name": "resnet18", "num_classes": 3})
    found = settings_of(model, optimizer_of(model, layer_decay=0.5))
    assert found["backbone.fc.weight"]["lr"] == 1
    assert found["backbone.conv1.weight"]["lr"] < 0.5


def test_frozen_parameters_are_left_out():
    model = Detector("resnet18", frozen_stages=1)
    found = settings_of(model, optimizer_of(model))
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_learning_rates_follow_the_schedule():
    from mmengine.optim import ConstantLR

    optimizer = optimizer_of(Detector("resnet18"), layer_decay=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    ConstantLR(optimizer, factor=0.1)
    torch.testing.assert_close([group["lr"] for group in optimizer.param_groups], [0.1 * value for value in before])


@pytest.mark.parametrize("paramwise", [{"layer_decay": 0}, {"layer_decay": 1.5}, {"num_layers": 4}])
def test_options_out_of_range(paramwise):
    with pytest.raises(InputError, match="layer_decay"):
        optimizer_of(Detector("resnet18"), **paramwise)


def test_model_without_layers():
    with pytest.raises(InputError, match="group_matcher"):
        optimizer_of(nn.Linear(2, 2))

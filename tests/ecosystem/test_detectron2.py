"""detectron2, against a stand-in of its interface: it has no wheel, and its sources need a compiler."""

import sys
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import pytest
from support.ecosystem import reloads, step
from support.seeded import image
from torch import nn

from terrazzo.integrations import detectron2


class Registry(dict):
    """fvcore's registry, as far as it is used."""

    def _do_register(self, name, item):
        assert name not in self
        self[name] = item


class Node(dict):
    """yacs' configuration, as far as it is used."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


@dataclass
class ShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module):
    size_divisibility = 0


class FPN(Backbone):
    """detectron2's FPN reads the backbone's output shape, and doubles maps."""

    def __init__(self, bottom_up, in_features, out_channels, norm="", top_block=None, fuse_type="sum"):
        super().__init__()
        assert isinstance(bottom_up, Backbone)
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        assert all(b == 2 * a for a, b in pairwise(strides))
        self.bottom_up, self.in_features = bottom_up, in_features
        self.lateral = nn.ModuleList(nn.Conv2d(shapes[name].channels, out_channels, 1) for name in in_features)

    def forward(self, x):
        maps = self.bottom_up(x)
        out, last = {}, None
        for name, conv in list(zip(self.in_features, self.lateral))[::-1]:
            last = conv(maps[name]) + (0 if last is None else nn.functional.interpolate(last, scale_factor=2))
            out[name.replace("res", "p")] = last
        return out


@pytest.fixture
def stand_in(monkeypatch):
    names = ("detectron2", "detectron2.modeling", "detectron2.layers", "detectron2.config")
    modules = {name: ModuleType(name) for name in (*names, "detectron2.modeling.backbone")}
    fpn = modules["detectron2.modeling.backbone.fpn"] = ModuleType("fpn")
    modules["detectron2.modeling"].Backbone = Backbone
    modules["detectron2.modeling"].BACKBONE_REGISTRY = Registry()
    modules["detectron2.layers"].ShapeSpec = ShapeSpec
    modules["detectron2.config"].CfgNode = Node
    fpn.FPN, fpn.LastLevelMaxPool = FPN, nn.Identity
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    detectron2.backbone_class.cache_clear()
    yield modules["detectron2.modeling"].BACKBONE_REGISTRY
    detectron2.backbone_class.cache_clear()


def test_steps_and_reloads(stand_in, tmp_path):
    def make():
        return detectron2.backbone_class()("s2aformer_mini", drop_path_rate=0.1)

    model, x = make(), image((64, 96))
    maps = model(x)
    shapes = model.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for name, y in maps.items():
        assert y.shape == (1, shapes[name].channels, 64 // shapes[name].stride, 96 // shapes[name].stride)
    assert model.size_divisibility == 32
    step(sum(y.square().mean() for y in maps.values()), model)
    reloads(model, make, lambda model: model(x), tmp_path / "model.pth")


def test_by_name_in_a_config(stand_in):
    fpn = Node(IN_FEATURES=["res2", "res3", "res4", "res5"], OUT_CHANNELS=16, NORM="", FUSE_TYPE="sum")
    cfg = Node(MODEL=Node(FPN=fpn))
    detectron2.register(cfg)
    detectron2.register(cfg)  # twice is no error: notebooks run cells again
    cfg.MODEL.TERRAZZO.NAME = "s2aformer_mini"
    plain = stand_in["terrazzo"](cfg, ShapeSpec(channels=4))
    assert plain.eval()(image((32, 32), chans=4))["res5"].shape[2:] == (1, 1)
    maps = stand_in["terrazzo_fpn"](cfg, ShapeSpec(channels=3)).eval()(image((64, 64)))
    assert {name: tuple(y.shape[1:]) for name, y in maps.items()} == {
        "p2": (16, 16, 16),
        "p3": (16, 8, 8),
        "p4": (16, 4, 4),
        "p5": (16, 2, 2),
    }

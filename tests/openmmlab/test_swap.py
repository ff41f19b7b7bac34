"""Swapping the backbone of a config."""

import pytest
import torch
from mmengine.registry import MODELS

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import load_config
from terrazzo.openmmlab.swap import swap_backbone


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "channels", "norms"),
    [
        ("resnet18", [64, 128, 256, 512], False),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768], True),
        ("nat_tiny", [64, 128, 256, 512], True),
        ("s2aformer_mini", [32, 64, 96, 288], True),
    ],
)
@pytest.mark.parametrize(
    "config", ["mask-rcnn_dinat-mini_fpn_1xb2-36e_nuclei-768x768", "upernet_dinat-mini_1xb4-10k_camvid-480x360"]
)
def test_heads_get_the_channels_of_the_maps(name, channels, norms, config):
    cfg = load_config(config)
    swap_backbone(cfg, name)
    backbone = cfg.model.backbone
    assert (backbone.name, backbone.drop_path_rate, backbone.norm_outputs) == (name, 0.2, norms)
    if "neck" in cfg.model:
        assert cfg.model.neck.in_channels == channels
    else:
        assert cfg.model.decode_head.in_channels == channels
        assert cfg.model.auxiliary_head.in_channels == channels[2]
    model = MODELS.build(cfg.model).eval()
    maps = model.backbone(torch.zeros(1, 3, 96, 64))
    assert [tuple(feature.shape[1:]) for feature in maps] == [
        (count, 96 // stride, 64 // stride) for count, stride in zip(channels, (4, 8, 16, 32))
    ]
    if "neck" in cfg.model:
        assert [feature.shape[1] for feature in model.neck(maps)] == [256] * 5
    else:
        assert model.decode_head(maps).shape == (1, 11, 24, 16)


def test_strides_are_kept():
    cfg = load_config("retinanet_dinat-mini_fpn_1xb4-36e_bccd-640x480")
    swap_backbone(cfg, "resnet18")
    assert cfg.model.backbone.out_indices == (2, 3, 4)
    assert cfg.model.neck.in_channels == [128, 256, 512]


def test_classifier_keeps_its_classes():
    cfg = load_config("dinat-mini_1xb64-30e_eurosat64")
    swap_backbone(cfg, "resnet18")
    assert cfg.model.backbone == dict(name="resnet18", num_classes=10, drop_path_rate=0.1)


def test_a_model_without_stochastic_depth():
    cfg = load_config("dinat-mini_1xb64-30e_eurosat64")
    swap_backbone(cfg, "efficientvit_b1")
    assert cfg.model.backbone == dict(name="efficientvit_b1", num_classes=10)
    MODELS.build(cfg.model)


def test_refusals():
    cfg = load_config("upernet_dinat-mini_1xb4-10k_camvid-480x360")
    with pytest.raises(InputError, match=r"none of stride \[4, 8, 32\]"):
        swap_backbone(cfg, "vit_tiny_patch16_224")
    with pytest.raises(InputError, match="did you mean"):
        swap_backbone(cfg, "resnet51")
    cfg.model.backbone = dict(type="ResNet", depth=18)
    with pytest.raises(InputError, match="no TerrazzoBackbone"):
        swap_backbone(cfg, "resnet18")


def test_a_recipe_goes_with_its_family():
    cfg = load_config("mctf-deit-tiny_1xb64-30e_eurosat64")
    swap_backbone(cfg, "resnet18")
    assert MODELS.build(cfg.model).recipe is None

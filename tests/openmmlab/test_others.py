"""OpenMMLab's other packages: configs of terrazzo's own for mmrotate and mmpose, and a model of each other package.

Each test runs where its package is installed; docs/openmmlab.md has the commands.
"""

import importlib.metadata
import importlib.util
import math

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from terrazzo.openmmlab.config import build_runner, find_config, load_config, packaged_configs
from terrazzo.tools.doctor.unfilled import Unfilled

PACKAGES = {"rotated": "mmrotate", "pose": "mmpose"}
OWN = {name: PACKAGES[path.parent.name] for name, path in packaged_configs().items() if path.parent.name in PACKAGES}
TRAINED = ("oriented-rcnn-le90_dinat-mini_fpn_1x_dota", "td-hm_dinat-mini_8xb32-210e_coco-256x192")
"""The other configs train in `make test-all`."""

BUILT = {
    "mmyolo": "yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py",
    "mmpretrain": "resnet/resnet18_8xb32_in1k.py",
    "mmaction": "recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py",
    "mmpose": "body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py",
    "mmrotate": "rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py",
}
"""A config of each package."""


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; docs/openmmlab.md has the command that installs it")


@pytest.mark.parametrize("name", OWN)
def test_full_size_model(name):
    needs(OWN[name])
    cfg = load_config(name, "/elsewhere")
    assert "data/" not in cfg.pretty_text.replace("/elsewhere/", "")
    cfg.model.backbone.pretrained = False
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    channels = cfg.model.neck.in_channels if "neck" in cfg.model else [cfg.model.head.in_channels]
    assert list(channels) == model.backbone.out_channels


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TRAINED else pytest.mark.slow) for name in OWN]
)
def test_trains_validates_and_predicts(name, tiny_config, tmp_path):
    needs(OWN[name])
    cfg = tiny_config(name, **{"default_hooks.checkpoint.save_optimizer": False})
    runner = build_runner(cfg, tmp_path, seed=0, purpose="train")
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar("train/loss").current())
    after = dict(runner.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("backbone."))
    assert any(key.startswith("val/") for key in runner.message_hub.log_scalars)
    assert list(tmp_path.glob("*.pth"))
    runner.model.eval()
    batch = next(iter(runner.val_dataloader))
    assert len(runner.model.val_step(batch)) == len(batch["inputs"])


@pytest.mark.parametrize("package", BUILT)
def test_a_model_of_the_package_builds(package):
    needs(package)
    cfg = Config.fromfile(find_config(f"{package}::{BUILT[package]}"))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), Unfilled():
        model = MODELS.build(ConfigDict(cfg.model.copy()))
    assert type(model).__module__.split(".")[0] in (package, "mmdet")
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6


def test_mmpretrain_knows_its_models_by_name():
    needs("mmpretrain")
    import mmpretrain

    assert "resnet18_8xb32_in1k" in mmpretrain.list_models("resnet18", task="Image Classification")


def test_a_missing_package_is_named():
    from terrazzo.errors import InputError

    if importlib.util.find_spec("mmrotate") is not None:
        pytest.skip("mmrotate is installed, and the message is about its absence")
    with pytest.raises(InputError, match="mmrotate is not installed"):
        load_config("oriented-rcnn-le90_dinat-mini_fpn_1x_dota")

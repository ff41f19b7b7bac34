"""`terrazzo train --spatial R`: processes that share images train as one process does."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from support.trainings import losses

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import build_runner, load_config
from terrazzo.openmmlab.seeding import seed_config
from terrazzo.openmmlab.spatial import SpatialModel, spatial_config

CONFIG = "fpn_dinat-mini_floors"
OPTIONS = {
    "train_dataloader.batch_size": 2,
    "model.data_preprocessor.size": [96, 96],
    "crop_size": 96,
    "model.backbone.drop_path_rate": 0.1,
    "model.backbone.depths": (1, 1, 1, 1),
    "model.backbone.embed_dim": 16,
    "model.backbone.num_heads": (1, 2, 4, 8),
    "model.backbone.dilations": [[3], [1], [1], [1]],
    "model.neck.in_channels": [16, 32, 64, 128],
    "model.neck.out_channels": 16,
    "model.decode_head.in_channels": [16] * 4,
    "model.decode_head.channels": 16,
    "model.decode_head.dropout_ratio": 0.1,
    "model.decode_head.loss_decode.avg_non_ignore": True,
    "train_cfg.max_iters": 3,
    "train_cfg.val_interval": 3,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.checkpoint.max_keep_ckpts": -1,
    "optim_wrapper.clip_grad": {"max_norm": 1.0},
    "custom_hooks": [{"type": "EMAHook", "momentum": 0.5}],
}


def run(tiny_data, work_dir, processes=1, options=None, **arguments):
    """The losses of each iteration, for each process."""
    return losses(CONFIG, tiny_data("floors"), work_dir, {**OPTIONS, **(options or {})}, processes, **arguments)


def weights_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = (found[key] - value).float().norm() / value.float().norm().clamp(min=1e-3)
        assert error <= 1e-4, f"{key} differs by {error:.1e}"


@pytest.mark.long
def test_two_processes_that_share_images(tiny_data, tmp_path):
    """Three iterations equal those of one process.

    With stochastic depth, dropout of channels, ignored pixels, clipped gradients and averaged weights (EMA).
    """
    (alone,) = run(tiny_data, tmp_path / "alone")
    for found in run(tiny_data, tmp_path / "shared", 2, spatial=2):
        np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert_same_weights(*(weights_of(tmp_path / name / "iter_3.pth") for name in ("shared", "alone")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "add --launcher pytorch"),
        ({"sharded": True}, "leave one of them out"),
        ({"launcher": "pytorch"}, "torchrun"),
    ],
)
def test_refusals(arguments, words, tiny_data, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=words):
        build_runner(load_config(CONFIG, tiny_data("floors"), OPTIONS), tmp_path / "run", spatial=2, **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.decode_head.loss_decode": {"type": "DiceLoss"}}, "decode_head.loss_decode is a DiceLoss"),
        ({"model.decode_head.sampler": {"type": "OHEMPixelSampler"}}, "decode_head chooses pixels by a OHEMPixel"),
        (
            {"model.decode_head.type": "NLHead", "model.decode_head.in_index": 3},
            r"decode_head \(mmseg\S+NLHead: no entry",
        ),
        ({"model.backbone.name": "resnet10t"}, r"backbone\S* \("),
    ],
)
def test_parts_that_are_not_known_are_refused_by_name(options, words, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    reduced = {key: value for key, value in OPTIONS.items() if key.startswith("model")}
    if "model.backbone.name" in options:
        reduced = {"model.backbone.out_indices": (1, 2, 3, 4)}
    if "model.decode_head.type" in options:
        reduced |= {"model.decode_head.feature_strides": None, "model.decode_head.in_channels": 16}
    model = load_config(CONFIG, options={**reduced, **options}).model
    if "model.decode_head.type" in options:
        del model.decode_head["feature_strides"]
    init_default_scope("mmseg")
    with pytest.raises(InputError, match=words):
        SpatialModel(MODELS.build(model), ranks=2)


def test_models_and_numbers_of_processes_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(InputError, match="--spatial 3 divides 4 processes into groups of unequal size"):
        SpatialModel(torch.nn.Conv2d(3, 3, 1), ranks=3)
    with pytest.raises(InputError, match="the model is a Conv2d, and only segmentors"):
        SpatialModel(torch.nn.Conv2d(3, 3, 1), ranks=2)
    init_default_scope("mmseg")
    model = load_config(CONFIG, options={key: value for key, value in OPTIONS.items() if key.startswith("model")}).model
    with pytest.raises(InputError, match="96 rows make 3 units of stride 32, too few for 4 ranks"):
        SpatialModel(MODELS.build(model), ranks=4)


def test_the_learning_rate_counts_groups_of_processes():
    """mmengine multiplies the batch size by the number of processes, and two of them share each image."""
    cfg = load_config(CONFIG, options={"auto_scale_lr": {"base_batch_size": 16}})
    with pytest.raises(InputError, match="needs train_dataloader"):
        spatial_config(cfg, 2)
    cfg.train_dataloader.sampler.type = "SeededSampler"
    spatial_config(cfg, 2)
    assert cfg.auto_scale_lr.base_batch_size == 32


def test_the_config_of_a_run_with_shared_images_trains_again(tiny_data, tmp_path):
    """With as many processes for an image, or with one."""
    cfg = load_config(CONFIG, tiny_data("floors"), {**OPTIONS, "auto_scale_lr": {"base_batch_size": 16}})
    seed_config(cfg)
    spatial_config(cfg, 2)
    spatial_config(cfg, 2)
    assert cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.train_dataloader.sampler.ranks_per_image == 2
    cfg.dump(tmp_path / "config.py")
    alone = build_runner(load_config(tmp_path / "config.py"), tmp_path / "run").cfg
    assert alone.auto_scale_lr.base_batch_size == 16
    assert "ranks_per_image" not in alone.train_dataloader.sampler
    assert "model_wrapper_cfg" not in alone

"""`terrazzo train --spatial R`: processes that share images train as one process does."""

import json

import numpy as np
import torch
from support import distributed_worker
from support.processes import forks

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
    """The losses of each iteration, for each process; one process is this one."""
    work_dir.mkdir(exist_ok=True)
    content = {"config": CONFIG, "root": str(tiny_data("floors")), "work_dir": str(work_dir)}
    content |= {"options": {**OPTIONS, **(options or {})}, "arguments": {"seed": 4, **arguments}}
    if processes == 1:
        return np.array(distributed_worker.train(**content))
    content["arguments"]["launcher"] = "pytorch"
    settings = work_dir / "settings.json"
    settings.write_text(json.dumps(content))
    forks(settings, processes)
    return [json.loads((work_dir / f"losses_{rank}.json").read_text()) for rank in range(processes)]


def weights_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = (found[key] - value).float().norm() / value.float().norm().clamp(min=1e-3)
        assert error <= 1e-4, f"{key} differs by {error:.1e}"


def test_two_processes_that_share_images(tiny_data, tmp_path):
    """Three iterations with stochastic depth, dropout of channels, ignored pixels, clipped gradients and a mean of
    weights equal those of one process."""
    alone = run(tiny_data, tmp_path / "alone")
    for found in run(tiny_data, tmp_path / "shared", 2, spatial=2):
        np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert_same_weights(*(weights_of(tmp_path / name / "iter_3.pth") for name in ("shared", "alone")))

"""Two processes, accumulated batches and mixed precision give the losses of one process with one batch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import distributed_worker
from support.processes import forks
from support.trainings import losses

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import build_runner, load_config
from terrazzo.openmmlab.distributed import check_launcher

CONFIG = "dinat-mini_1xb64-30e_clothing96"
OPTIONS = {
    "train_dataloader.batch_size": 10,  # all images of the tiny data
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "train_dataloader.dataset.transform.input_size": 64,
    "model.backbone.drop_path_rate": 0.0,
    "model.backbone.depths": (1, 1, 1, 1),
    "model.backbone.embed_dim": 32,
    "model.backbone.num_heads": (1, 2, 4, 8),
    "model.backbone.dilations": [[2], [1], [1], [1]],
    "param_scheduler": None,  # it counts iterations, and accumulation needs more iterations
    "model.mixup": None,  # it mixes within a batch
    "model.loss": {"type": "CrossEntropyLoss"},
    "train_cfg.max_epochs": 2,
    "train_cfg.val_interval": 100,
    "default_hooks.checkpoint.interval": 1,
    "default_hooks.checkpoint.max_keep_ckpts": -1,
    "optim_wrapper.clip_grad": {"max_norm": 1.0},
}


def torchrun(settings, processes):
    """Start the processes as users do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [distributed_worker.__file__, str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def run(tiny_data, work_dir, processes=1, options=None, launch=torchrun, **arguments):
    """The losses of each iteration, averaged over processes; one process is this one."""
    options = {**OPTIONS, **(options or {})}
    found = losses(CONFIG, tiny_data("clothing96"), work_dir, options, processes, launch, **arguments)
    return np.mean(found, axis=0)


@pytest.fixture(scope="module")
def single(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return run(tiny_data, folder), folder


@pytest.mark.long
def test_two_processes_with_half_the_batch(single, tiny_data, tmp_path):
    losses = run(tiny_data, tmp_path, 2, {"train_dataloader.batch_size": 5}, launch=forks)
    assert len(losses) == len(single[0]) == 2
    np.testing.assert_allclose(losses, single[0], rtol=0, atol=1e-4)
    assert torch.load(tmp_path / "epoch_2.pth", weights_only=True)["meta"]["epoch"] == 2


@pytest.mark.slow  # a minute and a half: three trainings, two of them of two processes
def test_sharded_processes_and_their_checkpoints(single, tiny_data, tmp_path):
    half = {"train_dataloader.batch_size": 5}
    losses = run(tiny_data, tmp_path, 2, half, sharded=True)
    np.testing.assert_allclose(losses, single[0], rtol=0, atol=1e-4)
    saved, plain = (torch.load(folder / "epoch_1.pth", weights_only=True) for folder in (tmp_path, single[1]))
    assert saved["state_dict"].keys() == plain["state_dict"].keys()
    for key, value in plain["state_dict"].items():
        assert type(saved["state_dict"][key]) is torch.Tensor
        assert saved["state_dict"][key].shape == value.shape
    for key, entry in plain["optimizer"]["state"].items():
        assert saved["optimizer"]["state"][key]["exp_avg"].shape == entry["exp_avg"].shape
    # One process continues a run of two processes, and two processes continue a run of one.
    middle = len(losses) // 2
    alone = run(tiny_data, tmp_path / "alone", resume=str(tmp_path / "epoch_1.pth"))
    np.testing.assert_allclose(alone, losses[middle:], rtol=0, atol=1e-4)
    again = run(tiny_data, tmp_path / "again", 2, half, resume=str(single[1] / "epoch_1.pth"), sharded=True)
    np.testing.assert_allclose(again, losses[middle:], rtol=0, atol=1e-4)


@pytest.mark.long
def test_accumulated_batches(single, tiny_data, tmp_path):
    losses = run(tiny_data, tmp_path, options={"train_dataloader.batch_size": 5}, accumulate=2)
    np.testing.assert_allclose(losses.reshape(-1, 2).mean(axis=1), single[0], rtol=0, atol=1e-4)


@pytest.mark.long
def test_bfloat16_is_close_and_keeps_float32_weights(single, tiny_data, tmp_path):
    losses = run(tiny_data, tmp_path, amp="bf16")
    assert not np.array_equal(losses, single[0])
    np.testing.assert_allclose(losses, single[0], rtol=2e-2)
    state = torch.load(tmp_path / "epoch_2.pth", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 training needs a GPU")
def test_float16_on_a_gpu(single, tiny_data, tmp_path):
    np.testing.assert_allclose(run(tiny_data, tmp_path, amp="fp16")[:2], single[0][:2], rtol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"amp": "fp8"}, "choose fp16 or bf16"),
        ({"launcher": "pytorch"}, "torchrun"),
        ({"launcher": "magic"}, "choose one of none, pytorch"),
        ({"sharded": True}, "add --launcher"),
        ({"scale_lr": True}, "auto_scale_lr.base_batch_size"),
    ],
)
def test_refusals(arguments, words, tiny_data, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=words):
        build_runner(load_config(CONFIG, tiny_data("clothing96"), OPTIONS), tmp_path, **arguments)


def test_float16_without_a_gpu_is_refused(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        build_runner(load_config(CONFIG, tiny_data("clothing96"), OPTIONS), tmp_path, amp="fp16")


def test_learning_rate_scales_with_the_batch(tiny_data, tmp_path):
    options = {**OPTIONS, "auto_scale_lr": {"base_batch_size": 40}, "optim_wrapper.optimizer.lr": 8e-4}
    runner = build_runner(load_config(CONFIG, tiny_data("clothing96"), options), tmp_path, scale_lr=True)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    assert runner.optim_wrapper.get_lr()["lr"][0] == pytest.approx(2e-4)


def test_slurm_is_recognised(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="srun terrazzo train"):
        check_launcher("slurm")
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_NODELIST", "a")):
        monkeypatch.setenv(name, value)
    check_launcher("slurm")

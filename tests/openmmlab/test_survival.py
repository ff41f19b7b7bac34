"""Training that is killed, runs out of disk or meets a loss that is not finite."""

import json
import math
import multiprocessing
import re
import resource
import signal
import time

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from support.processes import running_code

from terrazzo.errors import NonFiniteError, SavingError
from terrazzo.openmmlab.config import build_runner, load_config
from terrazzo.openmmlab.finite import pictures_of
from terrazzo.openmmlab.saving import find_latest_checkpoint
from terrazzo.openmmlab.workers import end_workers

FLOORS = "fpn_dinat-mini_floors"
CLOTHING = "dinat-mini_1xb64-30e_clothing96"
# Everything that draws random numbers is on: crops in workers, dropout, stochastic depth, several worker processes.
RANDOM = {
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 2,
    "train_dataloader.persistent_workers": True,
    "train_dataloader.dataset.pipeline.2.crop_size": (64, 64),
    "model.data_preprocessor.size": (64, 64),
    "model.backbone.name": "resnet10t",
    "model.backbone.out_indices": (1, 2, 3, 4),
    "model.backbone.drop_path_rate": 0.3,
    "model.decode_head.dropout_ratio": 0.3,
    "train_cfg.max_iters": 9,
    "param_scheduler.0.end": 3,
    "param_scheduler.1.begin": 3,
    "param_scheduler.1.end": 9,
    "train_cfg.val_interval": 100,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.checkpoint.max_keep_ckpts": 1,
    "default_hooks.logger.interval": 1,
}


class Stop(Exception):
    pass


class StopAfter(Hook):
    """Ends a training abruptly, after the checkpoint of an iteration."""

    priority = "LOWEST"

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            raise Stop


class Watch(Hook):
    """Notes which processes there are when a validation ends."""

    def __init__(self, seen):
        self.seen = seen

    def after_val_epoch(self, runner, metrics=None):
        self.seen.append(set(multiprocessing.active_children()))


def logged_losses(work_dir):
    found = {}
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # a killed process may leave half a line
                entry = json.loads(line)
                if "loss" in entry:
                    found[entry["step"]] = entry["loss"]
    return found


def command(work_dir, root, *more):
    options = [f"{key}={value}" for key, value in RANDOM.items()]
    arguments = ["train", FLOORS, "--data-root", str(root)]
    return [*arguments, "--work-dir", str(work_dir), *more, "--cfg-options", *options]


@pytest.mark.long
def test_killed_training_resumes_to_the_same_losses(tiny_data, tmp_path):
    root = tiny_data("floors")
    build_runner(load_config(FLOORS, root, RANDOM), tmp_path / "unbroken", seed=5).train()
    main = "from terrazzo.tools.cli import main; main()"
    with running_code(main, *command(tmp_path / "killed", root, "--seed", "5")) as (process, said):
        while max(logged_losses(tmp_path / "killed"), default=0) < 5:
            assert process.exitcode is None, said()[1][-3000:]
            time.sleep(0.02)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    reached = max(logged_losses(tmp_path / "killed"))
    (tmp_path / "killed" / "last_checkpoint").write_text("")  # as if killed between opening and writing that file
    saved = int(re.search(r"iter_(\d+)", find_latest_checkpoint(str(tmp_path / "killed"))).group(1))
    assert 4 <= saved <= reached < 9
    # This process has drawn other numbers by now, and the seed is the checkpoint's.
    build_runner(load_config(FLOORS, root, RANDOM), tmp_path / "killed", resume=True).train()
    expected, found = logged_losses(tmp_path / "unbroken"), logged_losses(tmp_path / "killed")
    assert sorted(expected) == sorted(found) == list(range(1, 10))
    np.testing.assert_allclose([found[step] for step in found], [expected[step] for step in found], rtol=1e-5)
    assert len(set(expected.values())) == 9
    ends = [torch.load(tmp_path / run / "iter_9.pth", weights_only=True) for run in ("unbroken", "killed")]
    assert ends[0]["param_schedulers"] == ends[1]["param_schedulers"]
    for key, value in ends[0]["state_dict"].items():
        torch.testing.assert_close(ends[1]["state_dict"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_epochs_resume_to_the_same_losses(tiny_data, tmp_path):
    """The same for a loop of epochs, with mixup, augmentation and an average of the weights."""
    options = {
        "model.backbone.name": "resnet10t",
        "train_dataloader.batch_size": 4,
        "train_dataloader.num_workers": 2,
        "train_dataloader.dataset.transform.input_size": 64,
        "model.mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        "model.loss": {"type": "SoftTargetCrossEntropy"},
        "model.backbone.drop_path_rate": 0.3,
        "train_cfg.max_epochs": 3,
        "train_cfg.val_interval": 10,
        "default_hooks.checkpoint.interval": 1,
        "default_hooks.checkpoint.max_keep_ckpts": 2,
        "custom_hooks": [{"type": "EMAHook", "ema_type": "ExponentialMovingAverage", "momentum": 0.1}],
    }

    def runner_of(folder, **more):
        return build_runner(load_config(CLOTHING, tiny_data("clothing96"), options), folder, **more)

    unbroken = runner_of(tmp_path / "a", seed=2)
    unbroken.train()
    broken = runner_of(tmp_path / "b", seed=2)
    steps = unbroken.iter // 3
    broken.register_hook(StopAfter(2 * steps + 1))
    with pytest.raises(Stop):
        broken.train()
    end_workers(broken)
    resumed = runner_of(tmp_path / "b", resume=tmp_path / "b" / "epoch_2.pth")
    resumed.train()
    expected, found = (runner.message_hub.get_scalar("train/loss").data[0] for runner in (unbroken, resumed))
    assert len(expected) == len(found) == 3 * steps
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    ends = [torch.load(folder / "epoch_3.pth", weights_only=True) for folder in (tmp_path / "a", tmp_path / "b")]
    for part in ("state_dict", "ema_state_dict"):
        for key, value in ends[0][part].items():
            torch.testing.assert_close(ends[1][part][key], value, rtol=1e-3, atol=1e-5)
    weights, average = ends[0]["state_dict"], ends[0]["ema_state_dict"]
    assert any(not torch.equal(value, average[f"module.{key}"]) for key, value in weights.items())


@pytest.mark.long
@pytest.mark.parametrize("config", [FLOORS, CLOTHING])
def test_workers_end_with_the_run(config, tiny_data, tmp_path):
    """Loops of iterations and of epochs; a later run of the same runner has new workers."""
    before = set(multiprocessing.active_children())
    if config == FLOORS:
        options = {**RANDOM, "train_cfg.max_iters": 1}
    else:
        options = {"train_dataloader.dataset.transform.input_size": 64, "train_cfg.max_epochs": 1}
        options["model.backbone.name"] = "resnet10t"
    for loader in ("train_dataloader", "val_dataloader"):
        options |= {f"{loader}.num_workers": 1, f"{loader}.persistent_workers": True, f"{loader}.batch_size": 4}
    cfg = load_config(config, tiny_data(config.rpartition("_")[2]), options)
    runner = build_runner(cfg, tmp_path, seed=1)
    seen = []
    runner.register_hook(Watch(seen))
    runner.train()
    assert len(seen[-1] - before) >= 2
    assert set(multiprocessing.active_children()) <= before
    runner.val()
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def small_files():
    """A function that limits the size of written files, like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


class FillDisk(Hook):
    """Leaves no room for a checkpoint from an iteration on."""

    def __init__(self, iteration, fill):
        self.iteration, self.fill = iteration, fill

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            self.fill()


@pytest.mark.long
def test_full_disk_loses_no_checkpoint(tiny_data, tmp_path, small_files):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), options), tmp_path, seed=1)
    runner.register_hook(FillDisk(4, lambda: small_files(1_000_000)))
    (tmp_path / ".partial-abc.iter_2.pth").write_text("what a killed process left")
    with pytest.raises(SavingError, match=r"iter_4\.pth' could not be written: .*File too large.*resume"):
        runner.train()
    small_files(resource.RLIM_INFINITY)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]
    assert torch.load(tmp_path / "iter_2.pth", weights_only=True)["meta"]["iter"] == 2
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_2.pth")
    assert not list(tmp_path.glob(".*"))


def test_work_dir_that_became_a_file_is_one_line(tiny_data, tmp_path):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    options["default_hooks.checkpoint.out_dir"] = str(tmp_path / "checkpoints")
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), options), tmp_path / "work", seed=1)

    def block():
        (tmp_path / "checkpoints").write_text("in the way")

    runner.register_hook(FillDisk(1, block))
    with pytest.raises(SavingError, match="could not be written"):
        runner.train()


@pytest.mark.long
def test_outdated_checkpoints_go_when_the_next_is_saved(tiny_data, tmp_path):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    options |= {"train_cfg.val_interval": 2, "default_hooks.checkpoint.save_best": "mIoU", "train_cfg.max_iters": 5}
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), options), tmp_path, seed=1)
    runner.train()
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert [name for name in names if name.startswith("iter")] == ["iter_5.pth"]
    assert len([name for name in names if name.startswith("best")]) == 1


class Poison(torch.nn.Module):
    """Gives NaN from a certain call on."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *args, **kwargs):
        self.calls -= 1
        output = self.inner(*args, **kwargs)
        return output * math.nan if self.calls < 0 else output


def test_nan_names_the_step_and_the_layer(tiny_data, tmp_path):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), options), tmp_path, seed=1)
    convolutions = runner.model.neck.lateral_convs
    convolutions[2].conv = Poison(convolutions[2].conv, calls=3)
    with pytest.raises(
        NonFiniteError,
        match=r"nan at iteration 4: first produced by layer neck\.lateral_convs\.2\.conv.*batch holds .*png",
    ):
        runner.train()
    assert all(value.isfinite().all() for value in runner.model.parameters())
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_2.pth"]


@pytest.mark.parametrize("place", ["weights", "batch"])
def test_nan_from_weights_and_from_data(place, tiny_data, tmp_path):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), options), tmp_path, seed=1)

    class Spoil(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if place == "weights":
                runner.model.backbone.model.layer2[0].conv1.weight.data[0, 0] = math.nan
            else:
                data_batch["inputs"] = [image * math.nan for image in data_batch["inputs"]]

    runner.register_hook(Spoil())
    words = r"layer2\.0\.conv1\.weight" if place == "weights" else "the batch itself"
    with pytest.raises(NonFiniteError, match=words):
        runner.train()


def test_throughput_and_memory_are_logged(tiny_data, tmp_path):
    options = {**RANDOM, "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False}
    runner = build_runner(load_config(FLOORS, tiny_data("floors"), {**options, "train_cfg.max_iters": 2}), tmp_path)
    runner.train()
    lines = [line for path in tmp_path.glob("*/vis_data/scalars.json") for line in path.read_text().splitlines()]
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["images_per_second"] == pytest.approx(2 / entry["time"], rel=0.9)
        assert 50 < entry["memory_mib"] < 1e6


@pytest.mark.parametrize(("count", "words"), [(1, "a0.png; the"), (2, "a0.png, a1.png"), (6, "a3.png and 2 more")])
def test_pictures_of_a_batch_are_named(count, words):
    from mmengine.structures import BaseDataElement

    paths = [f"a{index}.png" for index in range(count)]
    samples = {"inputs": torch.zeros(1), "data_samples": [BaseDataElement(metainfo={"img_path": p}) for p in paths]}
    folder = {"inputs": torch.zeros(1), "img_path": paths}
    for batch in (samples, folder, {"labelled": samples}):
        assert words in f"{pictures_of(batch)}; the weights were not updated"
    assert pictures_of({"inputs": torch.zeros(1)}) == ""

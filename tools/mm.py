"""What the verbs that take an OpenMMLab config share: checks before anything is created, building, loading, silence."""

import contextlib
import copy
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from rich.progress import Progress
from torch import nn

import terrazzo.openmmlab  # noqa: F401  prepares mmengine before it is used
from terrazzo.backbones._weights import current_names, weights_of
from terrazzo.checkpoints.records import arguments, check_changes, recorded
from terrazzo.errors import InputError
from terrazzo.openmmlab.building import building, registered_class
from terrazzo.openmmlab.checkpoint import load_file
from terrazzo.openmmlab.config import datasets
from terrazzo.openmmlab.saving import find_latest_checkpoint
from terrazzo.tools.files import check_folder

TASKS = ("classification", "segmentation", "detection", "panoptic", "restoration")

POINTS = ("begin", "end", "T_max", "milestones", "step_size", "periods", "total_steps")
"""The keys of mmengine's schedules that hold numbers of epochs or iterations, or lists of these numbers."""


def task_of(cfg: Config) -> str:
    """Which of `TASKS` the model of a config is for; InputError if it is for none."""
    settings = cfg.get("model") or {}
    if settings.get("type") == "Classifier":
        return "classification"
    if settings.get("type") == "Restorer":
        return "restoration"
    if "decode_head" in settings:
        return "segmentation"
    if "panoptic_fusion_head" in settings and (settings.get("test_cfg") or {}).get("panoptic_on", True):
        return "panoptic"
    if any(head in settings for head in ("bbox_head", "roi_head", "panoptic_head")):
        return "detection"
    raise InputError(
        f"the model of {cfg.filename}, {settings.get('type')}, is for none of these tasks: {', '.join(TASKS)}"
    )


def build_model(cfg: Config, checkpoint: str | Path) -> tuple[nn.Module, dict]:
    """Build the model of a config on the CPU, in evaluation mode, with exactly the weights of a checkpoint.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.

    Returns:
        The model, and the data set's facts: `classes` and `palette` (which may be None).

    Raises:
        InputError: the checkpoint cannot be read, or has another model or other classes.
    """
    saved = load_file(checkpoint, "cpu")
    with building(cfg, "model"):
        model = revert_sync_batchnorm(MODELS.build(without_weights(copy.deepcopy(cfg.model))))
    load_exactly(model, saved, checkpoint)
    meta = saved.get("meta") if isinstance(saved, dict) else None
    return model.eval(), class_facts(cfg, (meta or {}).get("dataset_meta") or {})


def load_exactly(model: nn.Module, saved: Any, checkpoint: str | Path) -> None:
    """Put saved weights into a model.

    Raises:
        InputError: they are of a model with other mixers or another token reduction, or lack a parameter, or have it in
            another shape.
    """
    check_changes(model, recorded(saved, checkpoint), checkpoint, arguments)
    try:
        state = weights_of(saved, ema=False)
    except InputError as error:
        raise InputError(f"checkpoint {checkpoint} {error}; name a file that a training wrote") from error
    own = model.state_dict()
    state = current_names(state, own)
    lacking = [key for key in own if key not in state]
    if lacking:
        raise InputError(
            f"checkpoint {checkpoint} does not fit this config: it lacks {len(lacking)} of {len(own)} tensors, such as "
            f"{lacking[0]}; name a file that a training of this config wrote"
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise InputError(
                f"checkpoint {checkpoint} has a model with other classes or sizes: {key} is {_sizes(state[key])} "
                f"in the file and {_sizes(value)} in the config; name a file that a training of this config wrote"
            )
    model.load_state_dict({key: state[key] for key in own})


def class_facts(cfg: Config, saved: dict | None = None) -> dict:
    """Names and palette of the classes: from the checkpoint, else the config, else the data set's class.

    Returns:
        `classes` and `palette`, each a list or None.
    """
    sources = [saved or {}]
    for split in ("test", "val", "train"):
        for dataset in datasets(cfg, split):
            sources += [
                dataset.get("metainfo") or {},
                getattr(registered_class(DATASETS, dataset, cfg), "METAINFO", {}),
            ]
    found = next((source for source in sources if source.get("classes")), {})
    palette = found.get("palette")
    return {
        "classes": list(found["classes"]) if found.get("classes") else None,
        "palette": [tuple(colour) for colour in palette] if isinstance(palette, (list, tuple)) else None,
    }


def test_dataset(cfg: Config) -> ConfigDict:
    """The settings of the data set that a config tests (or else validates) on."""
    for split in ("test", "val"):
        for dataset in datasets(cfg, split):
            return dataset
    raise InputError(f"config {cfg.filename} has no test_dataloader, so it does not say how a picture is prepared")


def check_model(cfg: Config) -> None:
    """Build the model of a config once and discard it; InputError if it cannot be built."""
    with building(cfg, "model"):
        MODELS.build(ConfigDict(cfg.model.copy()))


def check_work_dir(work_dir: Path, resume: bool | str) -> None:
    """Make sure that a training can write to `work_dir`, and has something to resume from if it is to.

    A note on standard error says if the folder holds checkpoints and the run does not resume.

    Raises:
        InputError: a file is in the way, or there is no checkpoint that can be read.
    """
    check_folder(work_dir)
    latest = find_latest_checkpoint(str(work_dir))
    if resume is True and latest is None:
        raise InputError(f"{work_dir} has no checkpoint to resume from; leave --resume out or name another --work-dir")
    if latest is not None and not resume and os.environ.get("RANK", "0") == "0":
        count = len(list(work_dir.glob("*.pth")))
        click.echo(
            f"note: {work_dir} holds {count} checkpoint{'s' if count != 1 else ''} of an earlier run; this run starts "
            "at iteration 0 and overwrites only checkpoints of the same name; --resume goes on from the last",
            err=True,
        )


def shorten(cfg: Config, max_iters: int | None, max_epochs: int | None) -> None:
    """Set how long a config trains, in place; every point of its schedules, in either unit, scales by new / old length.

    Points are rounded to whole epochs or iterations, and a schedule lasts for at least 1. So a warm-up in iterations
    shrinks with the epochs of the run, and never outlasts the run on a small data set.

    Raises:
        InputError: both limits are given, or the config counts the other way.
    """
    if max_iters is None and max_epochs is None:
        return
    if max_iters is not None and max_epochs is not None:
        raise InputError("--max-iters and --max-epochs both say how long to train; give one of them")
    if not cfg.get("train_cfg"):
        raise InputError(f"config {cfg.filename} has no train_cfg; there is nothing to train")
    with building(cfg, "train_cfg"):
        _shorten(cfg, max_iters, max_epochs)


def _shorten(cfg: Config, max_iters: int | None, max_epochs: int | None) -> None:
    loop, limit = cfg.train_cfg, max_iters if max_iters is not None else max_epochs
    key, other = ("max_iters", "max_epochs") if max_iters is not None else ("max_epochs", "max_iters")
    if key not in loop:
        option = f"--{other.replace('_', '-')}"
        raise InputError(f"config {Path(cfg.filename).name} counts {other.removeprefix('max_')}; use {option}")
    old, loop[key] = loop[key], limit
    if loop.get("val_interval"):
        loop.val_interval = min(loop.val_interval, limit)
    hooks = cfg.get("default_hooks") or {}
    # The logger counts iterations; an epoch shorter than its interval is logged at its end anyway.
    for name in ("checkpoint", "logger") if key == "max_iters" else ("checkpoint",):
        hook = hooks.get(name)
        if hook and hook.get("interval", -1) > 0:
            hook.interval = min(hook.interval, limit)
    schedules = cfg.get("param_scheduler") or []
    for schedule in schedules if isinstance(schedules, (list, tuple)) else [schedules]:
        for point in POINTS:
            if schedule.get(point) is not None:
                schedule[point] = _moved(schedule[point], limit, old, least=0 if point == "begin" else 1)
        if schedule.get("end") is not None:
            schedule.end = max(schedule.end, schedule.get("begin", 0) + 1)


LOGS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbLog"}
"""Backends of mmengine's visualizer, by the names that `terrazzo train --log` takes."""


def add_logs(cfg: Config, names: Sequence[str]) -> None:
    """Let a config's visualizer also log to some of `LOGS`, in place; `build_runner` checks that they are installed."""
    if not names:
        return
    visualizer = cfg.get("visualizer") or {"type": "Visualizer"}
    backends = list(visualizer.get("vis_backends") or [{"type": "LocalVisBackend"}])
    present = [backend.get("type") for backend in backends]
    for name in dict.fromkeys(names):
        if LOGS[name] not in present:
            project = {"init_kwargs": {"project": "terrazzo"}} if name == "wandb" else {}
            backends.append({"type": LOGS[name], **project})
    visualizer["vis_backends"] = backends
    cfg.visualizer = visualizer


class Ticker(Hook):
    """Advances a rich progress bar with every batch of a runner."""

    def __init__(self, bar: Progress):
        self.bar = bar

    def before_train(self, runner) -> None:
        self.bar.update(self.bar.task_ids[0], total=runner.max_iters)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        self.bar.advance(self.bar.task_ids[0])

    def before_test(self, runner) -> None:
        self.bar.update(self.bar.task_ids[0], total=len(runner.test_dataloader))

    def after_test_iter(self, runner, *args, **kwargs) -> None:
        self.bar.advance(self.bar.task_ids[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what mmengine, mmdet, mmseg and pycocotools print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _moved(points: Any, new: int, old: int, least: int) -> Any:
    """A point of a schedule, or each of a list of points, times new / old in whole numbers."""
    if isinstance(points, (list, tuple)):
        return [_moved(point, new, old, least) for point in points]
    return max(round(points * new / old), least)


def without_weights(settings: Any) -> Any:
    """The settings of a model, changed in place so that building it loads and downloads no weights."""
    if isinstance(settings, dict):
        settings.pop("recipe", None)  # it is for training, and may read a teacher's weights
        if settings.get("pretrained"):
            settings["pretrained"] = False if "name" in settings else None
        if "name" in settings and settings.get("checkpoint"):
            settings["checkpoint"] = None
        if isinstance(settings.get("init_cfg"), dict) and settings["init_cfg"].get("type") == "Pretrained":
            settings["init_cfg"] = None
        for key, value in settings.items():
            if key != "teacher":  # a teacher is compared with, and no checkpoint has its weights
                without_weights(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            without_weights(value)
    return settings


def _sizes(tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"

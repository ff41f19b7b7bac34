"""The metrics that hooks watch, to save the best checkpoint or to stop early; wrong names are found before training."""

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner

from terrazzo.errors import InputError
from terrazzo.openmmlab.building import registered_class
from terrazzo.openmmlab.restoration_quality import metric_names

COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
PROPOSAL_ITEMS = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")
IOU_METRICS = {
    "mIoU": ("mIoU", "mAcc"),
    "mDice": ("mDice", "mAcc"),
    "mFscore": ("mFscore", "mPrecision", "mRecall"),
}
PLACES = ("outfile_prefix", "output_dir")
PANOPTIC_ITEMS = tuple(f"{name}{kind}" for kind in ("", "_th", "_st") for name in ("PQ", "SQ", "RQ"))


def monitored(runner: Runner) -> Iterator[tuple[str, str]]:
    """Yields the setting and the name of each metric that hooks and schedules of a runner watch."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            for name in hook.key_indicators:
                if name != "auto":
                    yield "save_best of CheckpointHook", name
        elif isinstance(hook, EarlyStoppingHook):
            yield "monitor of EarlyStoppingHook", hook.monitor
    for schedule in runner.param_schedulers if isinstance(runner.param_schedulers, list) else ():
        if isinstance(schedule, ReduceOnPlateauParamScheduler):
            yield f"monitor of {type(schedule).__name__}", schedule.monitor


def expected_metrics(evaluator: Evaluator) -> set[str] | None:
    """The names of the metrics that an evaluator will give; None if they cannot be known.

    Raises:
        InputError: if one of its settings names a metric that does not exist.
    """
    names: set[str] = set()
    for metric in evaluator.metrics:
        known = type(metric).__module__.split(".")[0] in PACKAGES  # other packages have metrics of the same names
        describe = _KEYS.get(type(metric).__name__) if known else None
        keys = None if describe is None else describe(metric)
        if keys is None:
            return None
        names |= {f"{metric.prefix}/{key}" if metric.prefix else key for key in keys}
    return names


def check_formats(cfg: Config, setting: str) -> None:
    """Checks that metrics which only write predictions have a place to write them to.

    Args:
        cfg: a config.
        setting: "val_evaluator" or "test_evaluator".

    Raises:
        InputError: if a metric has no place.
    """
    evaluators = cfg.get(setting) or []
    for settings in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if not isinstance(settings, dict) or not settings.get("format_only") or not isinstance(settings["type"], str):
            continue
        kind = registered_class(METRICS, settings, cfg)
        places = [name for name in PLACES if kind is not None and name in inspect.signature(kind).parameters]
        if places and not any(settings.get(name) for name in places):
            raise InputError(
                f"{setting} has format_only, which writes the predictions and computes no metric, and no place to "
                f"write them to; set {setting}.{places[0]}"
            )


def check_monitored(runner: Runner) -> None:
    """Checks that the metrics which hooks watch will be there; it needs the runner's validation loop built.

    Raises:
        InputError: if a metric will be missing; the message lists the available metrics.
    """
    names = expected_metrics(runner.val_evaluator) if runner._val_loop is not None else None
    if names is not None:
        _compare(runner, names, "the validation gives")


@HOOKS.register_module()
class MonitoredMetricsHook(Hook):
    """Ends a training at its first validation if a metric that another hook watches is missing."""

    priority = "VERY_HIGH"

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Compares the names, unless the validation has no metric at all, as for a detector that finds nothing."""
        if metrics and runner._train_loop is not None:
            _compare(runner, set(metrics), "the validation gave")


def _compare(runner: Runner, names: set[str], gives: str) -> None:
    for setting, name in monitored(runner):
        if name not in names:
            close = difflib.get_close_matches(name, sorted(names), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            listed = ", ".join(sorted(names)) or "no metric"
            raise InputError(f"{setting} is '{name}', but {gives} {listed}{hint}")


def _coco(metric: BaseMetric) -> set[str]:
    if metric.format_only:
        return set()
    keys: set[str] = set()
    for kind in metric.metrics:
        if kind == "proposal_fast":
            keys |= {f"AR@{number}" for number in metric.proposal_nums}
        elif kind == "proposal":
            keys |= set(metric.metric_items or PROPOSAL_ITEMS)
        else:
            keys |= {f"{kind}_{item}" for item in metric.metric_items or COCO_ITEMS}
    if metric.classwise:
        keys |= {f"{name}_precision" for name in (metric.dataset_meta or {}).get("classes", ())}
    return keys


def _iou(metric: BaseMetric) -> set[str]:
    kinds = [metric.metrics] if isinstance(metric.metrics, str) else list(metric.metrics)
    unknown = [kind for kind in kinds if kind not in IOU_METRICS]
    if unknown:
        raise InputError(f"iou_metrics of IoUMetric has {unknown[0]!r}; choose from {', '.join(IOU_METRICS)}")
    return set() if metric.format_only else {"aAcc"}.union(*(IOU_METRICS[kind] for kind in kinds))


def _accuracy(metric: BaseMetric) -> set[str]:
    classes = (metric.dataset_meta or {}).get("classes", ())
    return {"top1", "mean_class"} | ({"top5"} if len(classes) > 5 else set())


def _panoptic(metric: BaseMetric) -> set[str]:
    return set() if metric.format_only else set(PANOPTIC_ITEMS)


PACKAGES = ("mmdet", "mmseg", "terrazzo")
"""The packages of the metrics below."""

_KEYS = {
    "CocoMetric": _coco,
    "IoUMetric": _iou,
    "ClassificationAccuracy": _accuracy,
    "CocoPanopticMetric": _panoptic,
    "RestorationQuality": lambda metric: set(metric_names()),
}

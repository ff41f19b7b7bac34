"""The metric of a zoom at many budgets, from one coarse and one fine pass over each picture."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator

from terrazzo.errors import InputError
from terrazzo.gated_zoom._zoom import Zoom, megapixels, tiles_within
from terrazzo.openmmlab.checkpoint import load_file
from terrazzo.openmmlab.config import build_runner
from terrazzo.tools import mm
from terrazzo.tools.console import progress
from terrazzo.tools.training.evaluation import plain_metric
from terrazzo.tools.zoom.gains import gains
from terrazzo.tools.zoom.options import ZoomOptions

BUDGETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
FULL = "full pass"
ORACLE = "oracle"
"""Tiles in the order of what the fine pass corrects by the annotation: wrong pixels, or missed boxes."""
HEADLINES = ("mIoU", "mDice", "mFscore")


@dataclass(frozen=True)
class Point:
    """A point of the curve.

    Attributes:
        score: What chose the tiles; `FULL` for the model without a zoom.
        budget: Share of the tiles.
        megapixels: Per picture, coarse pass and crops with halos.
        metric: Its name.
        value: Of the metric.
        pictures: How many.
    """

    score: str
    budget: float
    megapixels: float
    metric: str
    value: float
    pictures: int


@torch.no_grad()
def sweep(cfg: Config, checkpoint: Path, options: ZoomOptions, budgets: Sequence[float] = BUDGETS) -> list[Point]:
    """Evaluate a zoom of a config's model on its test data, for several budgets and scores, beside the full pass.

    The gate spares pictures for the score "region" alone, so that the other scores show the choice of tiles.

    Args:
        cfg: What `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: A file that a training of this config wrote.
        options: Of the zoom; its budget and score do not count.
        budgets: Shares of the tiles.

    Raises:
        InputError: The config has no test data, or no annotation in it, or another model than a segmentor or detector;
            the checkpoint or the heads do not fit; or the model finds nothing.
    """
    if not cfg.get("test_dataloader") or not cfg.get("test_evaluator"):
        raise InputError(f"config {cfg.filename} has no test_dataloader and test_evaluator; there is nothing to test")
    cfg = copy.deepcopy(cfg)
    mm.without_weights(cfg.model)
    with mm.quiet(), tempfile.TemporaryDirectory() as scratch, progress("testing") as bar:
        runner = build_runner(cfg, scratch, purpose="test")
        mm.load_exactly(runner.model, load_file(checkpoint, "cpu"), checkpoint)
        model, loader = runner.model.eval(), runner.test_dataloader
        zoom = dataclasses.replace(options, score=None).make(model)
        trained = ["region"] if zoom.heads is not None and zoom.heads.trained[0] else []
        scores = (*trained, zoom.untrained[0], "random")
        keys = [(FULL, 1.0), *((score, budget) for score in (*scores, ORACLE) for budget in budgets)]
        evaluators = _evaluators(runner.test_evaluator, loader.dataset.metainfo, keys)
        seen = dict.fromkeys(keys, 0.0)
        bar.update(bar.task_ids[0], total=len(loader))
        count = 0
        for batch in loader:
            data = model.data_preprocessor(batch, False)
            inputs, samples = data["inputs"], data["data_samples"]
            count += len(inputs)
            for key, result, used in _results(zoom, inputs, samples, scores, budgets):
                seen[key] += used
                evaluators[key].process(zoom.predictions(result, copy.deepcopy(samples)), batch)
            bar.advance(bar.task_ids[0])
        numbers = {key: _numbers(evaluator.evaluate(count)) for key, evaluator in evaluators.items()}
    name = _headline(list(numbers.values()), cfg)
    # Metrics of boxes say nothing of a model that finds nothing at all.
    return [Point(*key, seen[key] / count, name, found.get(name, 0.0), count) for key, found in numbers.items()]


def _results(
    zoom: Zoom, inputs: torch.Tensor, samples: Sequence, scores: Sequence[str], budgets: Sequence[float]
) -> Iterator[tuple[tuple[str, float], Any, float]]:
    """A batch's result for each score and budget, as the zoom gives it, and the megapixels of all its pictures."""
    grid = zoom.grid(inputs)
    yield (FULL, 1.0), zoom.passes(inputs), len(inputs) * grid.height * grid.width / 1e6
    seen, every = zoom.coarse(inputs), list(range(grid.count))
    coarse, fine = zoom.full_size(seen.result, grid), zoom.fine(inputs, grid, [every] * len(inputs))
    ranks = {n: seen.scores if n == "region" else zoom.untrained_scores(seen.result, grid, n) for n in scores}
    ranks[ORACLE] = gains(zoom, inputs, samples, grid, coarse, fine)
    for name, values in ranks.items():
        spared = zoom.gated_off(seen) if name == "region" else [False] * len(inputs)
        for budget in budgets:
            most = tiles_within(budget, grid)
            chosen = [[] if off else sorted(v.flatten().topk(most).indices.tolist()) for off, v in zip(spared, values)]
            crops = [[found[index] for index in tiles] for found, tiles in zip(fine, chosen)]
            used = sum(megapixels(seen.pixels, grid, len(tiles)) for tiles in chosen)
            yield (name, budget), zoom.united(coarse, crops, grid, chosen), used


def _evaluators(evaluator: Evaluator, metainfo: dict, keys: Sequence[tuple[str, float]]) -> dict:
    """An evaluator for each key; all share the annotation that COCO's metrics have read."""
    evaluator.dataset_meta = metainfo
    read = [api for api in (getattr(metric, "_coco_api", None) for metric in evaluator.metrics) if api is not None]
    return {key: copy.deepcopy(evaluator, {id(api): api for api in read}) for key in keys}


def _numbers(metrics: dict) -> dict[str, float]:
    plain = ((name, plain_metric(value)) for name, value in metrics.items())
    return {name: value for name, value in plain if type(value) is float}


def _headline(numbers: Sequence[dict[str, float]], cfg: Config) -> str:
    """The name of the number to draw: mIoU and its like, or the first, such as COCO's mAP of boxes."""
    names = list(dict.fromkeys(name for found in numbers for name in found))
    if not names:
        raise InputError(
            f"the test_evaluator of {cfg.filename} gives no number to draw; a detector that finds nothing has none"
        )
    return next((name for name in HEADLINES if name in names), names[0])

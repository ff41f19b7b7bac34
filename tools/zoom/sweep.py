"""The metric of a zoom at many budgets, from one coarse and one fine pass over each picture."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from torch.nn import functional as F

from terrazzo.errors import InputError
from terrazzo.gated_zoom._fusion import enlarged
from terrazzo.gated_zoom._labels import gain
from terrazzo.gated_zoom._scores import tile_scores
from terrazzo.gated_zoom._zoom import Zoom, megapixels, tiles_within
from terrazzo.openmmlab.checkpoint import load_file
from terrazzo.openmmlab.config import build_runner
from terrazzo.tools import mm
from terrazzo.tools.console import progress
from terrazzo.tools.training.evaluation import plain_metric
from terrazzo.tools.zoom.options import ZoomOptions

BUDGETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
FULL = "full pass"
ORACLE = "oracle"
"""Tiles in the order of the wrong pixels that the fine pass corrects, by the annotation."""
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
        InputError: The config has no test data or no segmentor, or the checkpoint or the heads do not fit.
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
        if not zoom.passes.is_segmentor:
            raise InputError(f"--sweep is for segmentors, and the model is a {type(model).__name__}: use --zoom alone")
        scores = (*(["region"] if zoom.heads is not None and zoom.heads.trained[0] else []), "entropy", "random")
        keys = [(FULL, 1.0), *((score, budget) for score in (*scores, ORACLE) for budget in budgets)]
        evaluators = {}
        for key in keys:
            evaluators[key] = runner.build_evaluator(copy.deepcopy(cfg.test_evaluator))
            evaluators[key].dataset_meta = loader.dataset.metainfo
        seen = dict.fromkeys(keys, 0.0)
        bar.update(bar.task_ids[0], total=len(loader))
        count = 0
        for batch in loader:
            data = model.data_preprocessor(batch, False)
            inputs, samples = data["inputs"], data["data_samples"]
            count += len(inputs)
            for key, logits, used in _results(zoom, inputs, samples, scores, budgets):
                seen[key] += used
                found = model.postprocess_result(logits, copy.deepcopy(samples))
                evaluators[key].process(found, batch)
            bar.advance(bar.task_ids[0])
        points = []
        for (score, budget), evaluator in evaluators.items():
            name, value = _headline(evaluator.evaluate(count), cfg)
            points.append(Point(score, budget, seen[score, budget] / count, name, value, count))
    return points


def _results(
    zoom: Zoom, inputs: torch.Tensor, samples: Sequence, scores: Sequence[str], budgets: Sequence[float]
) -> Iterator[tuple[tuple[str, float], torch.Tensor, float]]:
    """For each score and budget the logits (B, classes, H, W) of a batch, and the megapixels of all its pictures."""
    grid, size, passes = zoom.grid(inputs), inputs.shape[2:], zoom.passes
    yield (FULL, 1.0), passes(inputs), len(inputs) * size[0] * size[1] / 1e6
    seen, every = zoom.coarse(inputs), list(range(grid.count))
    coarse, fine = enlarged(seen.result, size), zoom.fine(inputs, grid, [every] * len(inputs))
    whole = zoom.united(coarse, fine, grid, [every] * len(inputs))
    ranks = {name: seen.scores if name == "region" else tile_scores(name, seen.result, grid) for name in scores}
    ignored = passes.model.decode_head.ignore_index
    ranks[ORACLE] = gain(coarse, whole, _truth(samples, inputs), grid, ignored, passes.threshold)
    for name, values in ranks.items():
        spared = zoom.gated_off(seen) if name == "region" else [False] * len(inputs)
        for budget in budgets:
            most = tiles_within(budget, grid)
            chosen = [[] if off else v.flatten().topk(most).indices.tolist() for off, v in zip(spared, values)]
            crops = [[found[index] for index in tiles] for found, tiles in zip(fine, chosen)]
            result = zoom.united(coarse, crops, grid, chosen)
            yield (name, budget), result, sum(megapixels(seen.pixels, grid, len(tiles)) for tiles in chosen)


def _truth(samples: Sequence, inputs: torch.Tensor) -> torch.Tensor:
    """The annotation (B, H, W) in the size of the inputs; the data has it in the pictures' own size."""
    if not samples or "gt_sem_seg" not in samples[0]:
        raise InputError("a sweep compares with the annotation, and the test data has no label maps")
    maps = [sample.gt_sem_seg.data[None].float() for sample in samples]
    same = [F.interpolate(labels, inputs.shape[2:], mode="nearest-exact")[0, 0].long() for labels in maps]
    return torch.stack(same).to(inputs.device)


def _headline(metrics: dict, cfg: Config) -> tuple[str, float]:
    plain = {name: value for name, value in ((n, plain_metric(v)) for n, v in metrics.items()) if type(value) is float}
    if not plain:
        raise InputError(f"the test_evaluator of {cfg.filename} gives no number to draw")
    name = next((name for name in HEADLINES if name in plain), next(iter(plain)))
    return name, plain[name]

"""What a training leaves beside its checkpoints: pictures of its curves, of what it confuses, and of examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop
from PIL import Image, ImageOps

from terrazzo._files import written_whole
from terrazzo._pictures import read_picture
from terrazzo.degradations.pixels import to_image
from terrazzo.errors import InputError, first_line
from terrazzo.tools import mm
from terrazzo.tools.predict import draw
from terrazzo.tools.training.confusion import draw_confusion, of_boxes, of_labels
from terrazzo.tools.training.curves import draw_curves, read_curves

EXAMPLES = 6
SIDE = 320
"""Pixels of an example's longer side."""

_SCORE = 0.3
_NOTHING = "nothing"


@dataclass(frozen=True)
class Example:
    """A picture of the validation set: its file, what is true, and what the model found."""

    path: str
    truth: Any
    found: Any


class ReportHook(Hook):
    """Counts confusions in each validation, and writes pictures into the work dir when the training has ended.

    The pictures are curves.png, confusion.png (classification, segmentation, and detection where the validation loads
    boxes) and examples.png.

    Attributes:
        written: the files.
    """

    priority = "LOW"

    def __init__(self, cfg: Config):
        try:
            self.task = mm.task_of(cfg)
        except InputError:  # a model with tasks of its own has only curves
            self.task = None
        facts = mm.class_facts(cfg)
        self.names, self.palette = facts["classes"], facts["palette"]
        self.scaled = _resized_after_loading(cfg)
        self.matrix: torch.Tensor | None = None
        self.examples: list[Example] = []
        self.written: list[Path] = []

    def before_val_epoch(self, runner) -> None:
        """Forgets the last validation."""
        self.examples = []
        if self.names is None:
            self.names = (runner.val_dataloader.dataset.metainfo or {}).get("classes")
        size = len(self.names or ()) + (self.task == "detection")
        self.matrix = torch.zeros(size, size, dtype=torch.int64) if size > 1 else None

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Counts a batch, and keeps the first pictures."""
        paths = data_batch.get("img_path") if isinstance(data_batch, Mapping) else None
        for index, sample in enumerate(outputs or ()):
            example = self._example(sample, paths[index] if paths else None)
            if example is None:
                continue
            if self.matrix is not None:
                self.matrix += self._confusion(example)
            if len(self.examples) < EXAMPLES and example.path:
                self.examples.append(example)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Adds the counts of all processes."""
        if self.matrix is not None:
            all_reduce(self.matrix)

    def after_train(self, runner) -> None:
        """Writes the pictures."""
        if not is_main_process():
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        try:
            self._write(Path(runner.work_dir), "epoch" if by_epoch else "iteration")
        except Exception as error:  # the training is done, and its checkpoints are written: a picture must not fail it
            click.echo(f"note: no pictures of the training: {type(error).__name__}: {first_line(error)}", err=True)

    def _write(self, work_dir: Path, unit: str) -> None:
        curves = read_curves(work_dir)
        if curves:
            self._save(work_dir / "curves.png", lambda path: draw_curves(curves, unit, path))
        if self.matrix is not None and self.matrix.sum():
            names = [*self.names, *([_NOTHING] if self.task == "detection" else [])]
            matrix = self.matrix.numpy()
            self._save(work_dir / "confusion.png", lambda path: draw_confusion(matrix, names, path))
        if self.examples:
            sheet = self.sheet()
            self._save(work_dir / "examples.png", sheet.save)

    def _save(self, path: Path, save) -> None:
        with written_whole(path) as temporary:
            save(temporary)
        self.written.append(path)

    def _example(self, sample: Any, path: str | None) -> Example | None:
        """What a sample of the model's outputs says; None if it does not have both truth and prediction."""
        if self.task == "classification":
            if "gt_label" not in sample:
                return None
            score = float(sample["scores"][sample["pred_label"]])
            return Example(path, sample["gt_label"], (sample["pred_label"], score))
        if self.task == "restoration":
            if len(self.examples) >= EXAMPLES:
                return None  # whole pictures: no more are kept than are drawn
            before, restored, truth = (to_image(sample[key]) for key in ("degraded", "restored", "target"))
            return Example(path, truth, (before.resize(truth.size, Image.Resampling.BICUBIC), restored))
        path = path or getattr(sample, "img_path", None)
        if self.task == "segmentation" and "gt_sem_seg" in sample and "pred_sem_seg" in sample:
            truth, found = (part.data[0].cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
            return Example(path, truth, found) if truth.shape == found.shape else None
        if self.task == "detection" and "gt_instances" in sample and "bboxes" in sample.gt_instances:
            truth, found = sample.gt_instances, sample.pred_instances
            found = found[found.scores >= _SCORE]
            found = found[found.scores.argsort(descending=True, stable=True)]
            boxes = getattr(truth.bboxes, "tensor", truth.bboxes).cpu().numpy()
            if self.scaled:
                boxes = boxes / np.tile(np.asarray(sample.scale_factor), 2)
            own = (found.bboxes.cpu().numpy(), found.labels.cpu().numpy(), found.scores.cpu().numpy())
            return Example(path, (boxes, truth.labels.cpu().numpy()), own)
        return None

    def _confusion(self, example: Example) -> torch.Tensor:
        size = len(self.matrix)
        if self.task == "classification":
            matrix = of_labels(np.array([example.truth]), np.array([example.found[0]]), size)
        elif self.task == "segmentation":
            matrix = of_labels(example.truth, example.found, size)
        else:
            matrix = of_boxes(*example.truth, *example.found[:2], size)
        return torch.from_numpy(matrix)

    def sheet(self) -> Image.Image:
        """The examples: each picture with what is true and what was found."""
        if self.task == "restoration":
            rows = [[_fitted(picture) for picture in (*example.found, example.truth)] for example in self.examples]
            return draw.grid(rows, ("degraded", "restored", "truth"), [])
        names = [*(self.names or ())]
        colours = draw.palette(max(len(names), 1), self.palette)
        pictures = [read_picture(example.path) for example in self.examples]
        if self.task == "classification":
            titles = [
                f"{_name(names, example.truth)} / {_name(names, example.found[0])} {example.found[1]:.0%}"
                for example in self.examples
            ]
            return draw.panels([_fitted(image) for image in pictures], titles, columns=3)
        rows = []
        for image, example in zip(pictures, self.examples):
            if self.task == "segmentation":
                truth, found = (Image.fromarray(draw.colour_map(x, colours)) for x in (example.truth, example.found))
            else:
                truth, found = (self._boxed(image, names, colours, *x) for x in (example.truth, example.found))
            rows.append([_fitted(sheet) for sheet in (image, truth, found)])
        legend = list(zip(names, colours))[:16] if self.task == "segmentation" else []
        return draw.grid(rows, ("picture", "truth", "prediction"), legend)

    @staticmethod
    def _boxed(image: Image.Image, names, colours, boxes, labels, scores: Sequence[float] | None = None) -> Image.Image:
        texts = [_name(names, label) for label in labels]
        if scores is not None:
            texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores)]
        return draw.box_overlay(image, boxes, texts, [colours[label % len(colours)] for label in labels])


def _resized_after_loading(cfg: Config) -> bool:
    """Whether the validation's pipeline resizes annotations along with the pictures."""
    for dataset in mm.datasets(cfg, "val"):
        kinds = [str(step.get("type")) for step in dataset.get("pipeline") or []]
        loaded = next((place for place, kind in enumerate(kinds) if kind.endswith("LoadAnnotations")), None)
        return loaded is not None and any("Resize" in kind for kind in kinds[loaded:])
    return False


def _fitted(image: Image.Image) -> Image.Image:
    """The picture in a square of `SIDE` pixels."""
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BILINEAR, color=draw.PAPER)


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"

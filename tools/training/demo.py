"""All steps in minutes, offline: make data, train, evaluate, draw, export, check."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from terrazzo._files import written_whole
from terrazzo.errors import InputError
from terrazzo.tools.console import progress
from terrazzo.tools.data.floors import CLASSES, PALETTE, write_floors
from terrazzo.tools.files import check_folder
from terrazzo.tools.predict.draw import colour_map, grid

CONFIG = "fpn_dinat-mini_floors"


MARKER = ".terrazzo-demo"


SIZE = 128


TIMES_BETTER = 4.0


_ROWS_DRAWN = 6


_DRAWN_SIZE = 256


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Attributes:
        miou: mean intersection over union of the trained segmentor, in percent.
        constant_miou: the same if every pixel gets the most common class.
        parity: largest relative error of the ONNX file's logits.
        exported: whether the ONNX file passed its check.
        seconds: duration of each step.
        files: the written files, by their content.
    """

    miou: float
    constant_miou: float
    parity: float
    exported: bool
    seconds: dict[str, float]
    files: dict[str, Path]

    @property
    def passed(self) -> bool:
        return self.exported and self.miou >= TIMES_BETTER * self.constant_miou


def run_demo(
    out: Path, seed: int = 0, train: int = 240, val: int = 40, options: Mapping[str, Any] | None = None
) -> Outcome:
    """Run every step of the demo.

    Args:
        out: folder for everything; new, empty, or left by an earlier demo, which is then replaced.
        seed: seed of data and training.
        train: floors to train on.
        val: floors to evaluate on.
        options: replacements of the config's settings, by dotted key.

    Raises:
        InputError: `out` holds something else, or is a file.
    """
    from terrazzo.openmmlab.config import build_runner, load_config
    from terrazzo.tools import mm
    from terrazzo.tools.data.checks import check_data
    from terrazzo.tools.export.formats.onnx import export_onnx
    from terrazzo.tools.export.targets import floor, metadata, noise, segmentor_for_export
    from terrazzo.tools.training.evaluation import evaluate

    data, work_dir = out / "floors", out / "training"
    cfg = load_config(CONFIG, data, options)
    _clear(out)
    seconds: dict[str, float] = {}
    with _timed("make floors", seconds):
        write_floors(data, train, val, SIZE, seed)
        check_data(cfg, ("train", "test"))
    with _timed("train", seconds), mm.quiet(), progress("training") as bar:
        cfg.pop("val_dataloader"), cfg.pop("val_cfg"), cfg.pop("val_evaluator")
        runner = build_runner(cfg, work_dir, seed=seed)
        runner.register_hook(mm.Ticker(bar))
        runner.train()
    checkpoint = Path((work_dir / "last_checkpoint").read_text().strip())
    with _timed("evaluate", seconds):
        miou = evaluate(cfg, checkpoint).metrics["mIoU"]
        constant = constant_miou(data)
    with _timed("draw", seconds):
        _draw(cfg, checkpoint, data, out / "predictions.png")
    with _timed("export", seconds):
        ready = segmentor_for_export(cfg, checkpoint, (SIZE, SIZE))
        report = export_onnx(
            ready.module,
            noise(ready.size, 1),
            out / f"{CONFIG}.onnx",
            checks={"floor": floor(ready.size, 1)},
            output_names=ready.module.output_names,
            metadata=metadata(ready),
        )
    files = {"picture": out / "predictions.png", "checkpoint": checkpoint, "ONNX": report.path, "data": data}
    outcome = Outcome(miou, constant, report.worst, report.passed, seconds, files)
    _write_record(outcome, out / "results.json")
    return outcome


def constant_miou(root: Path) -> float:
    """mIoU in percent, on the validation floors, if every pixel gets the training floors' most common class."""
    common = np.argmax(_class_counts(root / "labels" / "train"))
    counts = _class_counts(root / "labels" / "val")
    # The chosen class has an IoU of its share of the pixels; the other classes that occur have 0.
    return 100 * float(counts[common] / counts.sum()) / int((counts > 0).sum())


@contextlib.contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say on standard error that a step has begun, and note how long it took."""
    click.echo(f"{step} ...", err=True)
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _clear(out: Path) -> None:
    """Make `out` an empty folder that bears the demo's mark; InputError if it is a file or holds something else."""
    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise InputError(f"{out} is not empty and was not made by a demo; name another folder with --out DIR")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("`terrazzo demo` made this folder and replaces it when it is run again.\n")


def _class_counts(folder: Path) -> np.ndarray:
    counts = np.zeros(len(CLASSES), np.int64)
    for path in sorted(folder.iterdir()):
        counts += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=len(CLASSES))
    return counts


def _draw(cfg, checkpoint: Path, data: Path, path: Path) -> None:
    """Write a sheet of pictures, labels and predictions of the first validation floors."""
    import torch

    from terrazzo.tools import mm
    from terrazzo.tools.predict.openmmlab import config_predictor

    with mm.quiet():
        predictor = config_predictor(cfg, checkpoint, torch.device("cpu"))
    rows = []
    for source in sorted((data / "images" / "val").iterdir())[:_ROWS_DRAWN]:
        image = Image.open(source).convert("RGB")
        labels = np.asarray(Image.open(data / "labels" / "val" / source.name))
        sheets = (image, Image.fromarray(colour_map(labels, PALETTE)))
        predicted = Image.fromarray(colour_map(predictor.predict([image])[0].labels, PALETTE))
        rows.append(
            [sheet.resize((_DRAWN_SIZE, _DRAWN_SIZE), Image.Resampling.NEAREST) for sheet in (*sheets, predicted)]
        )
    with written_whole(path) as temporary:
        grid(rows, ("floor", "label", "prediction"), list(zip(CLASSES, PALETTE))).save(temporary)


def _write_record(outcome: Outcome, path: Path) -> None:
    record = {
        "miou": round(outcome.miou, 2),
        "constant_miou": round(outcome.constant_miou, 2),
        "onnx_relative_error": outcome.parity,
        "passed": outcome.passed,
        "seconds": {step: round(seconds, 1) for step, seconds in outcome.seconds.items()},
        "files": {what: str(file) for what, file in outcome.files.items()},
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")

"""The metrics of a checkpoint on its config's test data."""

import copy
import math
import numbers
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from terrazzo.errors import InputError
from terrazzo.tools.console import progress

if TYPE_CHECKING:
    from torch import nn


class Evaluation(NamedTuple):
    """The result of a test."""

    metrics: dict[str, Any]
    """The metrics, numbers rounded to four decimals."""
    notes: list[str]
    """Sentences: why there are no metrics, and where files were written."""


def evaluate(cfg, checkpoint: Path, prepare: "Callable[[nn.Module], object] | None" = None) -> Evaluation:
    """The metrics of a checkpoint on a config's test data; nothing is printed and no work dir is left behind.

    Args:
        cfg: what `terrazzo.openmmlab.config.load_config` gave.
        checkpoint: a file that a training of this config wrote.
        prepare: changes the model after its weights are loaded.

    Raises:
        InputError: the config has no test data, or the checkpoint does not fit.
    """
    from terrazzo.openmmlab.checkpoint import load_file
    from terrazzo.openmmlab.config import build_runner
    from terrazzo.tools import mm

    if not cfg.get("test_dataloader") or not cfg.get("test_evaluator"):
        raise InputError(f"config {cfg.filename} has no test_dataloader and test_evaluator; there is nothing to test")
    with mm.quiet():
        saved = load_file(checkpoint, "cpu")
        cfg = copy.deepcopy(cfg)
        mm.without_weights(cfg.model)
        with tempfile.TemporaryDirectory() as scratch, progress("testing") as bar:
            runner = build_runner(cfg, scratch, load_from=checkpoint, purpose="test")
            # mmengine loads what fits and goes on: this is where a checkpoint that does not fit is refused.
            mm.load_exactly(runner.model, saved, checkpoint)
            del saved
            if prepare is not None:
                prepare(runner.model)
            runner.register_hook(mm.Ticker(bar))
            metrics = runner.test()
            drawn = _keep_drawings(Path(scratch), _drawings_folder(cfg))
    notes = list(_notes(runner.test_evaluator.metrics, metrics, len(runner.test_dataloader.dataset)))
    if drawn:
        notes.append(f"{drawn} drawings were written to {_drawings_folder(cfg)}")
    return Evaluation({name: plain_metric(value) for name, value in metrics.items()}, notes)


def plain_metric(value: Any) -> Any:
    """A metric as plain data: numbers rounded to four decimals, also in lists and dicts; anything else as text."""
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Real):
        return round(float(value), 4)
    if isinstance(value, Mapping):
        return {str(key): plain_metric(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_metric(item) for item in value]
    return str(value)


def without_nan(value: Any) -> Any:
    """Plain data with None for the numbers that JSON lacks: NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _notes(evaluated: list, metrics: Mapping, pictures: int) -> Iterator[str]:
    """Notes about metrics that wrote files, and about a test without any metric."""
    written = False
    for metric in evaluated:
        if getattr(metric, "format_only", False):
            place = getattr(metric, "outfile_prefix", None) or getattr(metric, "output_dir", None)
            name = type(metric).__name__
            yield f"{name} has format_only: its predictions are in {_written(place)}, and it computes no metric"
            written = True
    if not metrics and not written:
        yield (
            f"no metrics: the model found nothing in the {pictures} pictures of the test data; check that the "
            "checkpoint is trained, and that the score_thr in the model's test_cfg is not too high"
        )


def _written(place: str | None) -> str:
    """The files with a name prefix, or the folder of that name."""
    if place is None:
        return "a folder that it chose"
    path = Path(place)
    if path.is_dir():
        return str(path)
    files = sorted(str(file) for file in path.parent.glob(f"{path.name}*"))
    return ", ".join(files) or f"{place}*"


def _drawings_folder(cfg) -> Path:
    """The folder for the drawings of the config's visualization hook in a test."""
    return Path(cfg.get("work_dir") or Path("work_dirs") / Path(cfg.filename).stem) / "test"


def _keep_drawings(scratch: Path, folder: Path) -> int:
    """Moves pictures out of a folder that is about to be removed; their number."""
    drawings = [path for path in scratch.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    for path in drawings:
        target = folder / path.relative_to(scratch).relative_to(path.relative_to(scratch).parts[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    return len(drawings)

"""Whether the data that a config names is there and has the config's classes, before anything is created."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

from terrazzo.errors import InputError
from terrazzo.openmmlab.config import datasets

# Larger annotation files are left to the training: reading them twice would cost a user minutes.
_MAX_JSON_BYTES = 32 << 20
_LABEL_MAPS_READ = 4


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Make sure that the files and folders which a config names are there and fit its classes.

    Args:
        cfg: the config.
        splits: of "train", "val" and "test", those that will be read.

    Raises:
        InputError: a folder or file is missing, a folder is empty, or the data has other classes than the config.
    """
    for split in splits:
        for dataset in datasets(cfg, split):
            root = Path(dataset.get("data_root") or "")
            prefixes = dataset.get("data_prefix") or {}
            parts = [dataset.get("ann_file"), dataset.get("split")]
            parts += prefixes.values() if isinstance(prefixes, dict) else [prefixes]
            for part in parts:
                if isinstance(part, str) and part:
                    _require(root / part, split)
            _check_classes(dataset, root)
        evaluators = cfg.get(f"{split}_evaluator") or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if isinstance(evaluator.get("ann_file"), str):
                _require(Path(evaluator["ann_file"]), split)


def _require(path: Path, split: str) -> None:
    if "://" in str(path):
        return
    if not path.exists():
        raise InputError(f"the config's {split} data is not there: {path} does not exist; set --data-root")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"the config's {split} data is not there: folder {path} is empty; set --data-root")


def _check_classes(dataset: ConfigDict, root: Path) -> None:
    if dataset.get("type") == "ImageFolderDataset":
        DATASETS.build(dataset.copy())  # it compares its folders with the config itself
        return
    classes = (dataset.get("metainfo") or {}).get("classes")
    if not classes:
        return
    annotations = root / (dataset.get("ann_file") or "")
    if annotations.suffix == ".json" and annotations.stat().st_size <= _MAX_JSON_BYTES:
        _check_categories(annotations, list(classes))
    labels = (dataset.get("data_prefix") or {}).get("seg_map_path")
    if labels:
        _check_label_maps(root / labels, dataset, len(classes))


def _check_categories(path: Path, classes: list[str]) -> None:
    try:
        names = [category["name"] for category in json.loads(path.read_text())["categories"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a COCO annotation file: {type(error).__name__}: {error}") from error
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise InputError(
            f"the config has {len(classes)} classes, but {path} does not have {', '.join(unknown)}; "
            f"its {len(names)} are: {', '.join(names[:12])}"
        )


def _check_label_maps(folder: Path, dataset: ConfigDict, count: int) -> None:
    """Read a few label maps and make sure that no value is beyond the classes."""
    ignored, shift = dataset.get("ignore_index", 255), bool(dataset.get("reduce_zero_label"))
    paths = (path for path in sorted(folder.rglob("*")) if path.name.endswith(dataset.get("seg_map_suffix", ".png")))
    for path in islice(paths, _LABEL_MAPS_READ):
        try:
            values = np.unique(np.asarray(Image.open(path)))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"label map {path} cannot be read: {error}") from error
        highest = max((int(value) - shift for value in values if value not in (ignored, 255)), default=0)
        if highest >= count:
            raise InputError(
                f"label map {path} has class {highest}, but the config has {count} classes, 0 to {count - 1}"
            )

"""Whether the data that a config names is right, before anything is created, trained, tested or compared.

`check_data` walks the data sets of the splits in use. The class of a data set decides what is checked: `coco`,
`label_maps`, `folders` or `degraded`; for other classes, only that the files exist. Each of these modules collects
facts about single files (`pictures`, `label_maps.read_map`, `coco.examine`) through `remembered.look`, which uses
threads and caches the facts until a file changes. It compares the facts with the config each time. Messages name
the file, the entry and the key.
"""

from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset

from terrazzo.errors import InputError
from terrazzo.openmmlab.datasets import ImageFolderDataset, RotatedImages
from terrazzo.openmmlab.degraded_pictures import DegradedPictures
from terrazzo.tools.data.checks.coco import check_coco
from terrazzo.tools.data.checks.degraded import check_degraded
from terrazzo.tools.data.checks.folders import check_folders
from terrazzo.tools.data.checks.label_maps import check_segmentation
from terrazzo.tools.data.checks.source import Source, evaluators, sources

_COCO_MODULES = ("mmdet.datasets.coco", "mmdet.datasets.coco_panoptic")


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Make sure that the data which a config names is there, whole, and fits its classes.

    Args:
        cfg: the config.
        splits: the splits that will be read: any of "train", "val" and "test".

    Raises:
        InputError: a folder or file is missing, empty or damaged, or does not fit the config or the other files.
    """
    for split in splits:
        for source in sources(cfg, split):
            if source.is_local():
                _check_places(source)
                _check_source(cfg, source)
        for key, settings in evaluators(cfg, split):
            for name in ("ann_file", "seg_prefix"):
                if isinstance(settings.get(name), str):
                    _require(Path(settings[name]), split, f"{key}.{name}")


def _check_places(source: Source) -> None:
    """Make sure that everything exists that the settings name."""
    prefixes = source.settings.get("data_prefix") or {}
    parts = {name: source.settings.get(name) for name in ("ann_file", "split")}
    if isinstance(prefixes, dict):
        parts |= {f"data_prefix.{name}": part for name, part in prefixes.items()}
    else:
        parts["data_prefix"] = prefixes
    for name, part in parts.items():
        if isinstance(part, str) and part:
            _require(source.path(part), source.split, f"{source.key}.{name}")


def _require(path: Path, split: str, key: str) -> None:
    if "://" in str(path):
        return
    what, step = f"the config's {split} data is not there", f"set --data-root or {key}"
    if not path.exists():
        raise InputError(f"{what}: {path} does not exist; {step}")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"{what}: folder {path} is empty; {step}")


def _check_source(cfg: Config, source: Source) -> None:
    kind = source.kind
    if issubclass(kind, (ImageFolderDataset, RotatedImages)):
        check_folders(source)
    elif issubclass(kind, DegradedPictures):
        check_degraded(source)
    elif hasattr(kind, "COCOAPI"):
        # A class with its own way of reading the file, such as LVIS, needs what only it knows.
        if {kind.load_data_list.__module__, kind.parse_data_info.__module__} <= set(_COCO_MODULES):
            check_coco(cfg, source)
    elif issubclass(kind, BaseDataset) and (source.settings.get("data_prefix") or {}).get("seg_map_path") is not None:
        check_segmentation(cfg, source)

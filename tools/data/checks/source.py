"""A data set as a config names it: where its parts are, which class reads them, and which keys a user would change."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from terrazzo.errors import InputError
from terrazzo.openmmlab.building import registered_class
from terrazzo.openmmlab.config import placed_datasets


@dataclass(frozen=True)
class Source:
    """One of the data sets of a split.

    Attributes:
        split: "train", "val" or "test".
        key: where the config has its settings, such as `train_dataloader.dataset`.
        settings: these settings.
        kind: its class; None if no registry knows the type.
    """

    split: str
    key: str
    settings: dict
    kind: type | None

    @property
    def evaluated(self) -> bool:
        """Whether the split is for evaluation and not for training."""
        return self.split != "train"

    def path(self, part: str) -> Path:
        """The path of a part that the settings name, relative to `data_root` or absolute."""
        return Path(self.settings.get("data_root") or "") / part

    def prefix(self, name: str) -> Path:
        """The folder that `data_prefix` has under a name; `data_root` itself if it has none."""
        prefixes = self.settings.get("data_prefix")
        return self.path((prefixes.get(name) if isinstance(prefixes, dict) else None) or "")

    def classes(self) -> list[str]:
        """The names of the classes: from the config, or else from the data set's class."""
        metainfo = self.settings.get("metainfo") or {}
        given = metainfo.get("classes") if isinstance(metainfo, dict) else None
        names = given if given is not None else (getattr(self.kind, "METAINFO", None) or {}).get("classes")
        return [names] if isinstance(names, str) else list(names or ())

    def step(self, name: str) -> dict | None:
        """The settings of the first step of the pipeline that has this type, however deep it stands."""
        return next((step for step in _steps(self.settings.get("pipeline")) if _name(step.get("type")) == name), None)

    def built(self, **changes: Any) -> Any:
        """The data set itself, with changes to its settings."""
        given = {key: value for key, value in self.settings.items() if key not in ("type", "_scope_")}
        return self.kind(**{**given, **changes})

    def is_local(self) -> bool:
        """Whether its files are on a disk, rather than behind a storage backend or an address."""
        backend = self.settings.get("backend_args") or {}
        named = [self.settings.get("data_root"), self.settings.get("ann_file")]
        return backend.get("backend", "local") == "local" and not any("://" in str(place) for place in named)


def sources(cfg: Config, split: str) -> Iterator[Source]:
    """The innermost data sets of a split.

    Raises:
        InputError: no registry knows the type of a data set.
    """
    for key, settings in placed_datasets(cfg, split):
        kind = registered_class(DATASETS, settings, cfg)
        if kind is None:
            raise InputError(
                f"{key}.type is {settings.get('type')!r}, which no registry has; correct it, or import the module "
                "that registers it through custom_imports"
            )
        yield Source(split, key, settings, kind)


def evaluators(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """The settings of a split's metrics, and the key of each."""
    found = cfg.get(f"{split}_evaluator") or []
    several = isinstance(found, (list, tuple))
    for index, settings in enumerate(found if several else [found]):
        if isinstance(settings, dict):
            yield f"{split}_evaluator[{index}]" if several else f"{split}_evaluator", settings


def metric_name(settings: dict) -> str:
    """The type of a metric, without a scope in front."""
    return _name(settings.get("type"))


def near(path: Path) -> str:
    """What to say about a missing file: the file beside it with a name that differs only in case or suffix."""
    if "\\" in path.name:
        return "its name has backslashes, as on Windows; write slashes"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"folder {path.parent} does not exist"
    for alike in (lambda name: name.lower(), lambda name: Path(name).stem.lower()):
        found = sorted(name for name in names if alike(name) == alike(path.name))
        if found:
            return f"the folder has {found[0]}: make the names the same"
    return "put it there, or correct the name"


def and_more(count: int) -> str:
    """The end of a message about the first of several: " (and 3 more)"."""
    return f" (and {count - 1} more)" if count > 1 else ""


def _steps(value: Any) -> Iterator[dict]:
    if isinstance(value, dict):
        if "type" in value:
            yield value
        for item in value.values():
            yield from _steps(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _steps(item)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)).split(".")[-1]

"""Reads OpenMMLab's descriptions of models, as mmpretrain asks the package `model-index` for them."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml


@dataclass
class Model:
    """A model of a description file: each of its keys as an attribute, `In Collection` as `in_collection`."""

    name: str
    filepath: str
    config: str | None = None
    weights: str | None = None
    results: list[SimpleNamespace] | None = None
    in_collection: str | None = None
    metadata: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelIndex:
    """The models of an index file."""

    models: list[Model]

    def build_models_with_collections(self) -> None:
        """A model needs nothing from its collection here."""


def load(path: str) -> ModelIndex:
    """Reads an index file and the files that it imports."""
    return ModelIndex(list(_models(Path(path))))


def _models(path: Path):
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for entry in _listed(content.get("Models")):
        known = {key.lower().replace(" ", "_"): value for key, value in entry.items()}
        results = known.get("results")
        if results is not None:
            results = [SimpleNamespace(**{k.lower(): v for k, v in result.items()}) for result in _listed(results)]
        keys = ("config", "weights", "in_collection", "metadata")
        yield Model(
            known["name"], str(path), results=results, data=entry, **{key: known[key] for key in keys if key in known}
        )
    for name in _listed(content.get("Import")):
        yield from _models(path.parent / name)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]

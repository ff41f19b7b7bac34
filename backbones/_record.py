"""The record of how `convert_attention` and `reduce` changed a model: plain JSON data, which checkpoints carry.

A record is `{"convert": [{"mixer", "options", "layers"}, ...], "reduce": {"method", "options", "blocks"}}`. A part that
did not happen is left out, so the record of an unchanged model is empty. Options include defaults, because another
version may have other defaults.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """The value of an option as JSON data; tuples become lists, and a value without a JSON form becomes its text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple, range)) else str(value)


def defaults(*functions: Callable, without: Iterable[str] = ("device", "dtype")) -> dict[str, Any]:
    """The options of functions or classes that have a default, as plain data."""
    found = [p for function in functions for p in inspect.signature(function).parameters.values()]
    return {p.name: plain(p.default) for p in found if p.default is not p.empty and p.name not in without}


def grouped(changed: Mapping[int, tuple[str, dict[str, Any]]]) -> list[Record]:
    """The part "convert" of a record: layers with the same mixer and the same options form one entry.

    Args:
        changed: for each layer with a mixer, the mixer's name and all its options.
    """
    found: list[Record] = []
    for layer, (mixer, options) in changed.items():
        same = next((entry for entry in found if (entry["mixer"], entry["options"]) == (mixer, options)), None)
        if same is None:
            found.append(same := {"mixer": mixer, "options": options, "layers": []})
        same["layers"].append(layer)
    return found


def checked(record: Any) -> Record:
    """A record from a file, without entries that this version does not know.

    Raises:
        ValueError, KeyError, TypeError: it is malformed.
    """
    if not isinstance(record, Mapping):
        raise TypeError
    entries = [_entry(entry, "mixer", "layers") for entry in record.get("convert") or ()]
    found: Record = {"convert": entries} if entries else {}
    return found | ({"reduce": _entry(record["reduce"], "method", "blocks")} if record.get("reduce") else {})


def _entry(entry: Any, name: str, places: str) -> Record:
    texts = [entry[name], *entry["options"]]  # messages show them
    if not all(isinstance(text, str) and text.isidentifier() for text in texts):
        raise ValueError
    if not isinstance(entry["options"], Mapping) or any(type(place) is not int for place in entry[places]):
        raise TypeError
    return {name: entry[name], "options": plain(entry["options"]), places: list(entry[places])}

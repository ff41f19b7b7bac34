"""The record of a model's mixers and token reduction in checkpoint files (see `terrazzo.backbones._record`).

A `.pth` file has it under `KEY` in `meta`, a `.safetensors` file as JSON under `KEY` in its metadata. Weights fit a
model only if the model was changed in the recorded way. Weights without a record serve any model, as ever.
"""

import json
import logging
import os
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from terrazzo.backbones._hosts import host_in, record_of
from terrazzo.backbones._record import Record, checked, defaults
from terrazzo.backbones._reduce import reduce
from terrazzo.backbones._weights import MIXER
from terrazzo.backbones.mixers import Mixer, mixer_class, mixers
from terrazzo.backbones.reducers import reducer_class, reducers
from terrazzo.errors import InputError

KEY = "terrazzo.changes"
"""Where a checkpoint has the record."""

LONGEST = 400
"""How many characters of a record a message shows: the record comes from a file."""

_logger = logging.getLogger(__name__)


def recorded(checkpoint: Any, filename: str | os.PathLike | None = None) -> Record:
    """The record of a checkpoint; empty if it has none.

    Args:
        checkpoint: the content of a file.
        filename: the file. A `.safetensors` file has the record beside its content.

    Raises:
        InputError: the record is malformed.
    """
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    found = meta.get(KEY) if isinstance(meta, Mapping) else None
    path = None if filename is None else pathlib.Path(filename).expanduser()
    if path is not None and path.suffix == ".safetensors" and path.is_file():
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(KEY)
    try:
        return {} if found is None else checked(json.loads(found) if isinstance(found, str) else found)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"checkpoint '{filename}' has a malformed record of its model's mixers and token reduction; write the "
            "file again where it was made"
        ) from error


def meta_of(record: Record) -> dict[str, Any]:
    """What a `.pth` file has in `meta` for a record."""
    return {KEY: record} if record else {}


def metadata_of(record: Record) -> dict[str, str]:
    """What a format whose metadata is text has for a record."""
    return {KEY: json.dumps(record)} if record else {}


def check_changes(
    model: nn.Module, record: Record, filename: str | os.PathLike, advice: Callable[[nn.Module, Record], str]
) -> None:
    """Check that a model was changed in the way that the record of a checkpoint says.

    Mixers, their layers, the method of reduction and its blocks must be equal. Other options may differ, which a
    warning says. A model may have changes that the record says nothing about, as a model may that gets plain weights.

    Args:
        model: the model that gets the weights, or a model around it.
        record: see `recorded`.
        filename: the checkpoint, for messages.
        advice: writes a record as what a user passes: `command` or `arguments`.

    Raises:
        InputError: the model has other mixers or another reduction. The message names what to pass.
    """
    if host_in(model) is None:  # a model of another kind does not fit by its tensors, or has its own reduction
        if "convert" in record and not any(isinstance(part, Mixer) for part in model.modules()):
            # Without this, the mixers' tensors would be left out and all others taken.
            raise InputError(
                f"checkpoint '{filename}' is of a model with {advice(model, {'convert': record['convert']})}, and a "
                f"{type(model).__name__} cannot have mixers: name a checkpoint of a model with attention"
            )
        return
    if not record:
        return
    own = record_of(model)
    if any(key in record and of(record) != of(own) for key, of in (("convert", _mixers), ("reduce", _blocks))):
        raise InputError(
            f"checkpoint '{filename}' is of a model with other mixers or another token reduction than this model, "
            f"which has {advice(model, own) if own else 'none'}: pass {advice(model, record)}"
        )
    if different := _other_options(record, own):
        _logger.warning(f"checkpoint '{filename}' is of a model with other options: {_short(', '.join(different))}")


def say_left_out(weights: Mapping[str, Any], model: nn.Module, filename: str | os.PathLike) -> None:
    """Log a warning if weights have parameters of mixers and the model has no mixers."""
    lost = [name for name in weights if MIXER in name]
    if lost and not any(MIXER in name for name in model.state_dict()):
        _logger.warning(
            f"checkpoint '{filename}' has {len(lost)} tensors of mixers, such as {lost[0]}, and this model has none, "
            "so they are left out; convert the model first to use them"
        )


def command(model: nn.Module, record: Record) -> str:
    """A record as options of a command: `--mixer llsa,topk=8 --reduce mctf,r=8`."""
    texts = []
    for option, name, options in _told(record, _depth(model)):
        pairs = [f"{key}={tuple(x) if isinstance(x, list) else x}".replace(" ", "") for key, x in options.items()]
        texts.append(f"--{option} {shlex.quote(','.join([name, *pairs]))}")
    return _short(" ".join(texts))


def arguments(model: nn.Module, record: Record) -> str:
    """A record as arguments of a backbone: `convert=dict(mixer='llsa', topk=8)`."""
    found: dict[str, list[str]] = {}
    for option, name, options in _told(record, _depth(model)):
        argument, key = ("convert", "mixer") if option == "mixer" else ("reduce", "method")
        pairs = [f"{key}={value!r}" for key, value in ({key: name} | options).items()]
        found.setdefault(argument, []).append(f"dict({', '.join(pairs)})")
    texts = [f"{key}={x[0]}" if len(x) == 1 else f"{key}=[{', '.join(x)}]" for key, x in found.items()]
    return _short(" and ".join(texts))


def _short(text: str) -> str:
    """A text that may come from a file, in one line of limited length."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: LONGEST + 1])
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _told(record: Record, depth: int | None) -> list[tuple[str, str, dict[str, Any]]]:
    """For each change the option of commands, the mixer or method, and what is not a default."""
    found = []
    for entry in record.get("convert", ()):
        known = defaults(mixer_class(entry["mixer"])) if entry["mixer"] in mixers() else {}
        options = _without(entry["options"], known)
        if depth is None or entry["layers"] != list(range(depth)):
            options["layers"] = entry["layers"]
        found.append(("mixer", entry["mixer"], options))
    if entry := record.get("reduce"):
        kind = reducer_class(entry["method"]) if entry["method"] in reducers() else None
        options = _without(entry["options"], defaults(reduce, kind) if kind else {})
        if kind is None or depth is None or entry["blocks"] != list(kind.default_blocks(depth)):
            options["blocks"] = entry["blocks"]
        found.append(("reduce", entry["method"], options))
    return found


def _without(options: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in known or known[key] != value}


def _depth(model: nn.Module) -> int | None:
    host = host_in(model)
    return None if host is None else len(host.blocks)


def _mixers(record: Record) -> dict[int, str]:
    return {layer: entry["mixer"] for entry in record.get("convert", ()) for layer in entry["layers"]}


def _blocks(record: Record) -> tuple[str, list[int]] | None:
    entry = record.get("reduce")
    return entry and (entry["method"], sorted(entry["blocks"]))


def _other_options(record: Record, own: Record) -> list[str]:
    """The options in which two records differ; an option that only one version has is no difference."""
    ours = {layer: entry for entry in own.get("convert", ()) for layer in entry["layers"]}
    pairs = [(entry, ours[layer]) for entry in record.get("convert", ()) for layer in entry["layers"]]
    pairs += [(record["reduce"], own["reduce"])] if "reduce" in record else []
    both = [(a["options"], b["options"]) for a, b in pairs]
    found = [f"{key}={a[key]} and not {b[key]}" for a, b in both for key in a if key in b and a[key] != b[key]]
    return list(dict.fromkeys(found))

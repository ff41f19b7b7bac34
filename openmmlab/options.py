"""Options such as `train_dataloader.batch_size=2`: how their text is read and applied.

A config has variables, such as `train_pipeline` and `crop_size`, beside the settings that the runner reads. Its
settings hold copies of them, so an option that changes a variable afterwards would change nothing. Therefore the option
is applied while the file is read, right after the assignment, and Python carries it to wherever the variable is used.
"""

import ast
import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from terrazzo.errors import InputError

WORDS = {"true": True, "false": False, "none": None, "null": None}

READ = frozenset(
    (
        "activation_checkpointing",
        "compile",
        "custom_imports",
        "data_root",
        "efficient_conv_bn_eval",
        "find_unused_parameters",
        "model_wrapper_cfg",
        "runner_type",
        "strategy",
        "sync_bn",
    )
)
"""Top-level keys that mmengine or terrazzo read from a config, beside the arguments of the runner."""

_edits: dict[str, Any] = {}
"""The options that `edited` applies at the moment."""


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Turns `["a.b=1", "c=text"]` into `{"a.b": 1, "c": "text"}`; see `parse_value`.

    Raises:
        InputError: if a pair has no `=` or no key, or the brackets of a value do not match.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"option '{pair}' is not of the form KEY=VALUE, such as train_dataloader.batch_size=2")
        try:
            options[key.strip()] = parse_value(text)
        except ValueError as error:
            raise InputError(f"option '{pair}' cannot be read: {error}") from error
    return options


def parse_value(text: str) -> Any:
    """Reads a value: a Python literal, or else the forms of mmengine's tools, such as `[bbox,segm]`, `(a,b)` and `a,b`.

    Any other text stays text.

    Raises:
        ValueError: if brackets do not match, or text in braces is not a Python dict.
    """
    stripped = text.strip()
    try:
        value = ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    else:
        if isinstance(value, str):
            return parse_value(value) if value.strip()[:1] in ("[", "(") else value  # the shell left the quotes there
        return list(value) if isinstance(value, tuple) and not stripped.startswith("(") else value
    if stripped.lower() in WORDS:
        return WORDS[stripped.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(stripped)
    if stripped.startswith("{"):
        raise ValueError("a dict is written as in Python, with quotes: {'type': 'SGD', 'lr': 0.1}")
    for (opening, closing), kind in (("[]", list), ("()", tuple)):
        if stripped.startswith(opening) and stripped.endswith(closing):
            return kind(parse_value(part) for part in _split(stripped[1:-1]))
    parts = _split(stripped)
    return text if len(parts) < 2 else [parse_value(part) for part in parts]


def _split(text: str) -> list[str]:
    """The parts of a text between its commas, ignoring commas inside brackets and a last comma."""
    parts, open_brackets = [""], []
    for character in text:
        if character in "([{":
            open_brackets.append(character)
        elif character in ")]}" and (not open_brackets or open_brackets.pop() + character not in ("()", "[]", "{}")):
            raise ValueError("its brackets do not match")
        if character == "," and not open_brackets:
            parts.append("")
        else:
            parts[-1] += character
    if open_brackets:
        raise ValueError("its brackets do not match")
    parts = [part.strip() for part in parts]
    return parts if parts[-1] else parts[:-1]


def carry_options(cfg: Config, options: Mapping[str, Any], read: Callable[[], Config]) -> Config:
    """The config, with options that change variables of its file applied wherever the variables are used.

    Args:
        cfg: the config as it was read.
        options: dotted keys to values.
        read: reads the config again.

    Raises:
        InputError: if an option has a key that nothing reads, or changes a variable without any effect.
    """
    known = runner_keys(cfg)
    for key in options:
        _check_top(key, cfg, known)
    done: dict[str, Any] = {}
    for key, value in options.items():
        if key.split(".")[0] in known or _at(cfg, key.split(".")) == value:
            continue
        done[key] = value
        with _editing(done):
            before, cfg = cfg, read()
        if all(cfg.get(name) == before.get(name) for name in known):
            raise InputError(_without_effect(key, value, before, known))
    return cfg


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Sets the options of a config, in place.

    Raises:
        InputError: if an option does not fit the config.
    """
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"options {dict(options)} do not fit config '{_name(cfg)}': {error}") from error


def runner_keys(cfg: Config) -> set[str]:
    """The top-level keys that the runner of a config reads."""
    keys = set(READ)
    for runner in (Runner, RUNNERS.get(str(cfg.get("runner_type", "Runner")))):
        if runner is not None:
            keys |= set(inspect.signature(runner.__init__).parameters)
    return keys - {"self", "cfg", "args", "kwargs"}


def edited_value(name: str, value: Any) -> Any:
    """A config's variable with the current options applied; unchanged if they do not fit, for example in a base."""
    for key, new in _edits.items():
        top, *rest = key.split(".")
        if top == name:
            with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
                value = _put(value, rest, new)
    return value


def _check_top(key: str, cfg: Config, known: set[str]) -> None:
    top = key.split(".")[0]
    if top in cfg or top in known:
        return
    close = difflib.get_close_matches(top, sorted({*cfg, *known}), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"its keys are: {', '.join(sorted(cfg))}"
    raise InputError(f"option {key}: neither config '{_name(cfg)}' nor the runner knows '{top}'; {hint}")


@contextlib.contextmanager
def _editing(options: Mapping[str, Any]) -> Iterator[None]:
    """Inside this context, mmengine applies the options after the assignments of variables in config files."""
    original = Config.__dict__["_pre_substitute_base_vars"]

    def substitute(filename: str, temporary: str) -> dict:
        placeholders = original.__func__(filename, temporary)
        if temporary.endswith(".py"):
            path = Path(temporary)
            path.write_text(_with_edits(path.read_text(encoding="utf-8"), options), encoding="utf-8")
        return placeholders

    Config._pre_substitute_base_vars = staticmethod(substitute)
    _edits.update(options)
    try:
        yield
    finally:
        Config._pre_substitute_base_vars = original
        _edits.clear()


def _with_edits(text: str, options: Mapping[str, Any]) -> str:
    """The code of a config in which each variable that options name is passed through `edited_value` once it is set."""
    wanted = {key.split(".")[0] for key in options}
    tree = ast.parse(text)
    statements: list[ast.stmt] = []
    for statement in tree.body:
        statements.append(statement)
        stored = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for name in sorted(stored & wanted):
            call = f"{name} = __import__({__name__!r}, fromlist=['_']).edited_value({name!r}, {name})"
            statements += ast.parse(call).body
    tree.body = statements
    return ast.unparse(tree)


def _put(value: Any, path: Sequence[str], new: Any) -> Any:
    """A nested value with a new part, as `Config.merge_from_dict` makes it."""
    if not path:
        return Config._merge_a_into_b(new, value) if isinstance(new, dict) and isinstance(value, dict) else new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        value[key] = _put(value.get(key, {}), rest, new)
    elif isinstance(value, list):
        value[int(key)] = _put(value[int(key)], rest, new)
    elif isinstance(value, tuple):
        return tuple(_put(list(value), path, new))
    else:
        raise TypeError(f"{value!r} has no parts")
    return value


def _at(value: Any, path: Sequence[str]) -> Any:
    """The part of nested dicts, lists and tuples at a path; None if there is none."""
    for key in path:
        try:
            value = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return None
    return value


def _places(value: Any, where: str, found: Callable[[str, Any], bool]) -> Iterator[str]:
    """The dotted keys of all parts of a nested value with `found(last key, part)`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in items:
        place = f"{where}.{key}"
        if found(str(key), part):
            yield place
        yield from _places(part, place, found)


def _without_effect(key: str, value: Any, cfg: Config, known: set[str]) -> str:
    """The message for an option that changes a variable without effect, with the keys to set instead."""
    top, *rest = key.split(".")
    old, last = cfg.get(top), top.split("_")[-1]

    def same(name: str, part: Any) -> bool:
        if rest:
            return name in (top, last) and _at(part, rest) is not None
        return name == top or (part == old and name == last)

    places = [
        f"{place}.{'.'.join(rest)}" if rest else place
        for name in sorted(known & set(cfg))
        for place in _places(cfg[name], name, same)
    ]
    split = f"{top.split('_')[0]}_"  # for train_pipeline, the places in train_dataloader
    places = [place for place in places if place.startswith(split)] or places
    hint = f"set {' or '.join(places[:3])}" if places else "set the key of the part that it is meant for"
    return f"option {key}={value} has no effect: no setting of config '{_name(cfg)}' uses '{top}'; {hint}"


def _name(cfg: Config) -> str:
    return Path(cfg.filename).name if cfg.filename else "without a file"

"""Facts about files, collected in parallel and kept in the user's cache folder until a file changes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import PIL

import terrazzo
from terrazzo._files import written_whole
from terrazzo.tools.console import progress

Facts = TypeVar("Facts", bound=tuple)

# Files a thread looks at before the progress bar moves; few, so that Ctrl-C does not wait for long.
_CHUNK = 16
# A file that was written this recently could change again and keep its time and size.
_SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """The folder for everything that terrazzo can recompute: `$XDG_CACHE_HOME/terrazzo`, or `~/.cache/terrazzo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "terrazzo"


def look(
    what: str, examine: Callable[[Path], Facts], restore: Callable[..., Facts], paths: Sequence[Path]
) -> list[Facts | None]:
    """The facts about files, by threads: Pillow decodes outside of the interpreter's lock.

    Args:
        what: name of the facts, for the progress bar and the cache. Facts with another name are stored apart, even for
            the same files.
        examine: finds out the facts about a file. It raises nothing: that a file is bad is a fact.
        restore: makes facts from the parts of a tuple that went through JSON; the class of a named tuple does.
        paths: the files.

    Returns:
        The facts in the order of the files; None for a file that does not exist.
    """
    if not paths:
        return []
    paths = [Path(os.path.abspath(path)) for path in paths]
    store = _store(what, paths)
    known = _load(store)
    fresh: dict[str, list] = {}

    def facts(path: Path) -> Facts | None:
        try:
            status = path.stat()
        except (OSError, ValueError):  # a ValueError is a name with a null byte
            return None
        stamp = [status.st_size, status.st_mtime_ns]
        kept = known.get(str(path))
        if isinstance(kept, list) and kept[:2] == stamp:
            try:
                return restore(*kept[2])
            except (IndexError, TypeError, ValueError):
                pass  # a damaged cache: look again
        found = examine(path)
        if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
            fresh[str(path)] = [*stamp, found]
        return found

    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    results: list[Facts | None] = []
    pool = ThreadPoolExecutor()
    try:
        with progress(f"checking {what.split(':')[0]}", total=len(paths)) as bar:
            for part in pool.map(lambda chunk: [facts(path) for path in chunk], chunks):
                results += part
                bar.advance(bar.task_ids[0], len(part))
    finally:
        pool.shutdown(cancel_futures=True)
        _save(store, known, fresh)
    return results


def _store(what: str, paths: Sequence[Path]) -> Path:
    """The cache file for facts about files of one folder, found by this version of the checks."""
    try:
        root = os.path.commonpath([path.parent for path in paths])
    except ValueError:  # on several drives
        root = ""
    key = "\n".join((what, root, terrazzo.__version__, PIL.__version__))
    return cache_folder() / "checked" / f"{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:24]}.json"


def _load(store: Path) -> dict[str, Any]:
    """What the cache holds; nothing if it is damaged or cannot be read."""
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(store: Path, known: dict, fresh: dict) -> None:
    """Add fresh facts to the cache, if it can be written at all."""
    if not fresh:
        return
    try:
        with written_whole(store) as temporary:
            temporary.write_text(json.dumps({**known, **fresh}), encoding="utf-8")
    except (OSError, ValueError):
        pass

"""A repair of pycocotools: it reads annotations in whatever encoding the system has, and stops at a byte-order mark."""

import builtins
import functools
import importlib.util


def repair() -> None:
    """Lets pycocotools and mmdet's subclasses read JSON as UTF-8, with a byte-order mark or without."""
    if importlib.util.find_spec("pycocotools") is None:
        return
    import pycocotools.coco

    # The module opens only JSON files, with the built-in `open`; a name in the module takes precedence.
    pycocotools.coco.open = functools.partial(builtins.open, encoding="utf-8-sig")

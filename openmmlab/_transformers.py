"""mmengine registers an optimizer of transformers, whose import takes seconds: here only its use imports it."""

import importlib
import importlib.util
import sys
import types


def Adafactor(*args, **kwargs):
    """The optimizer `transformers.Adafactor`."""
    import transformers

    return transformers.Adafactor(*args, **kwargs)


def defer() -> None:
    """Import mmengine's optimizers without transformers, if nobody has imported either yet."""
    known = {"mmengine.optim", "transformers"} & sys.modules.keys()
    if known or importlib.util.find_spec("transformers") is None:
        return
    stand_in = types.ModuleType("transformers")
    stand_in.Adafactor = Adafactor
    stand_in.__getattr__ = _of_the_real_package
    sys.modules["transformers"] = stand_in
    try:
        import mmengine.optim  # noqa: F401
    finally:
        if sys.modules.get("transformers") is stand_in:
            del sys.modules["transformers"]


def _of_the_real_package(name: str) -> object:
    """Any other attribute, for packages that mmengine imports and that use transformers."""
    if name.startswith("__"):  # `inspect` looks at the files of all modules
        raise AttributeError(name)
    sys.modules.pop("transformers", None)
    return getattr(importlib.import_module("transformers"), name)


defer()

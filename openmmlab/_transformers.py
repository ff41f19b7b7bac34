"""mmengine registers an optimizer of transformers, whose import takes seconds: here only its use imports it."""

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
    sys.modules["transformers"] = stand_in
    try:
        import mmengine.optim  # noqa: F401
    finally:
        del sys.modules["transformers"]


defer()

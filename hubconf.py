"""torch.hub: every model by its name, without an installation.

    model = torch.hub.load("PATH/TO/terrazzo", "dinat_mini", source="local", pretrained=True)

`torch.hub.list` names the models of a copy on GitHub. The arguments are those of `timm.create_model`.
"""

import importlib.util
import pathlib
import sys

dependencies = ["torch", "timm"]


def _import_this_checkout() -> None:
    """Import this folder as the package `terrazzo`, whatever the folder's name is, unless it is imported already."""
    if "terrazzo" in sys.modules:
        return
    root = pathlib.Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "terrazzo", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = sys.modules["terrazzo"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["terrazzo"]  # as Python does, so that the next attempt starts anew
        raise


def _entry(name: str):
    """What `torch.hub.load` calls for a model."""

    def entry(pretrained: bool = False, **kwargs):
        import timm

        return timm.create_model(name, pretrained=pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}, with the arguments of timm.create_model, such as in_chans, and the model's own arguments."
    return entry


def _names() -> list[str]:
    from terrazzo.backbones._names import EVERY_MODEL, registered_models

    return list(registered_models(EVERY_MODEL))


_import_this_checkout()
globals().update({name: _entry(name) for name in _names()})

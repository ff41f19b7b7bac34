"""Mixers: published mechanisms that mix a ViT's tokens in place of softmax attention.

A mixer is a file of this folder with a name that does not begin with `_`, and the file's only `Mixer` class. A new
mixer needs no entry elsewhere. `terrazzo.convert_attention` puts mixers into timm's ViTs. No host knows a mixer, and no
mixer knows a host: a mixer takes queries, keys and values, and where the tokens stand
(`terrazzo.backbones._place.Place`).
"""

import importlib
import inspect
import pkgutil
from typing import Any

from terrazzo.backbones.mixers._mixer import Host as Host
from terrazzo.backbones.mixers._mixer import Mixer as Mixer
from terrazzo.errors import InputError


def mixers() -> tuple[str, ...]:
    """The names of all mixers, which are the names of their files."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")))


def mixer_class(name: str) -> type[Mixer]:
    """The class of a mixer.

    Raises:
        InputError: No mixer has this name.
    """
    if not isinstance(name, str) or name not in mixers():
        raise InputError(f"mixer must be one of {', '.join(mixers())}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    own = (item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__)
    (found,) = (item for item in own if issubclass(item, Mixer))
    return found


def options_of(name: str) -> tuple[str, ...]:
    """The names of a mixer's options."""
    return tuple(
        key for key in inspect.signature(mixer_class(name)).parameters if key not in ("host", "device", "dtype")
    )


def create_mixer(name: str, host: Host, device: Any = None, dtype: Any = None, **options: Any) -> Mixer:
    """Make a mixer for an attention layer.

    Args:
        name: One of `mixers()`.
        host: The layer.
        device, dtype: Device and dtype of the mixer's parameters and buffers.
        **options: See the mixer's class.

    Raises:
        InputError: No mixer has this name, it has no option of a given name, or an option's value is not valid.
    """
    kind, known = mixer_class(name), options_of(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        has = f"options of {name!r} are {', '.join(known)}" if known else f"{name!r} has no options"
        raise InputError(f"{has}, got {', '.join(unknown)}")
    mixer = kind(host, device=device, dtype=dtype, **options)
    mixer.name, mixer.options = name, options
    return mixer

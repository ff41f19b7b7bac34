"""What each mixer of a model does on an image: the mechanism, or softmax attention on a small map, and why."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from terrazzo.backbones.mixers import Mixer


@contextlib.contextmanager
def seats(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Inside this context, a record for each call of a mixer, JSON-ready.

    A record has: layer, the name of the attention module; mixer and options; grid, rows and columns of the patches, or
    None if tokens were merged; softmax, why the mixer computes softmax attention instead, or None.
    """
    found: list[dict[str, Any]] = []

    def record(mixer: Mixer, given: tuple) -> None:
        place = given[3]
        found.append(
            {
                "layer": names[mixer],
                "mixer": mixer.name,
                "options": dict(mixer.options),
                "grid": None if place.grid is None else list(place.grid),
                "softmax": None if place.grid is None else mixer.dense(place.grid, place.prefix),
            }
        )

    names = {module: name.removesuffix(".mixer") for name, module in model.named_modules() if isinstance(module, Mixer)}
    hooks = [mixer.register_forward_pre_hook(record) for mixer in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()

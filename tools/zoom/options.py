"""The options of a zoom, and the zoom that they make of a model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from terrazzo.errors import InputError
from terrazzo.tools.options import UserPath

if TYPE_CHECKING:
    from torch import nn

    from terrazzo.gated_zoom import Zoom

SCORES = ("region", "entropy", "margin", "uncertainty", "random")


@dataclass(frozen=True)
class ZoomOptions:
    """What a user asked for; None stands for the default, or for what the heads were trained with.

    Attributes:
        scale, budget, tile, halo, stride, score, refine: As in `terrazzo.zoom`.
        heads: A file.
        gate: A probability; None for the threshold of the heads.
    """

    scale: float
    budget: float = 0.25
    tile: int | None = None
    halo: int = 32
    stride: int = 32
    heads: Path | None = None
    score: str | None = None
    gate: float | None = None
    refine: bool = False

    def make(self, model: "nn.Module | None") -> "Zoom":
        """The zoom of a model of OpenMMLab. InputError if it cannot be made, or `model` is of another kind."""
        from terrazzo.gated_zoom import load_heads, zoom
        from terrazzo.gated_zoom._passes import is_detector

        if model is None or not (hasattr(model, "encode_decode") or is_detector(model)):
            kind = "of another kind" if model is None else f"a {type(model).__name__}"
            raise InputError(f"--zoom is for segmentors and detectors of OpenMMLab configs, and this model is {kind}")
        heads = None if self.heads is None else load_heads(self.heads)
        tile = self.tile
        if tile is None:
            tile = 192 if heads is None else int(heads.settings[1])
        gate = self.gate
        if gate is None:
            gate = "stored" if heads is not None and heads.trained[1] else 0
        made = zoom(
            model,
            self.scale,
            tile,
            self.halo,
            self.budget,
            gate,
            stride=self.stride,
            heads=heads,
            score=self.score,
            refine=self.refine,
        )
        return made.eval()


def zoom_options(function: Callable) -> Callable:
    """Add --zoom and the options that go with it; the verb gets `zoom`, a `ZoomOptions` or None without --zoom."""

    @functools.wraps(function)  # also takes over the options that the verb has so far
    def with_zoom(*args, zoom_scale: float | None, **kwargs):
        given = {name: kwargs.pop(f"zoom_{name}") for name, _ in _OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        if zoom_scale is None and given:
            raise click.UsageError(f"{_flag(next(iter(given)))} is for a zoom; give its scale, too, such as --zoom 4")
        return function(*args, zoom=None if zoom_scale is None else ZoomOptions(zoom_scale, **given), **kwargs)

    for name, settings in reversed(_OPTIONS):
        with_zoom = click.option(_flag(name), f"zoom_{name}", **settings)(with_zoom)
    help_ = "Segmentors and detectors: look at pictures with sides 1/SCALE first, and again at the tiles where it pays."
    return click.option("--zoom", "zoom_scale", type=click.FloatRange(min=1), metavar="SCALE", help=help_)(with_zoom)


def _flag(name: str) -> str:
    return "--budget" if name == "budget" else f"--zoom-{name}"


_OPTIONS = (
    ("budget", dict(type=click.FloatRange(0, 1), help="Share of the tiles that get a second look [default: 0.25].")),
    ("heads", dict(type=UserPath(), metavar="FILE", help="Heads that a training of a zoom config wrote.")),
    (
        "score",
        dict(
            type=click.Choice(SCORES),
            help="What chooses tiles [default: region with heads; else entropy, or uncertainty].",
        ),
    ),
    ("gate", dict(type=click.FloatRange(0, 1), help="Threshold of the gate [default: that of the heads].")),
    ("refine", dict(is_flag=True, default=None, help="Segmentors: correct fused logits by the heads' refinement.")),
    ("tile", dict(type=click.IntRange(min=1), help="Side of a tile in pixels [default: that of the heads, else 192].")),
    ("halo", dict(type=click.IntRange(min=0), help="Pixels around a tile that the model sees, too [default: 32].")),
    ("stride", dict(type=click.IntRange(min=1), help="The model's stride [default: 32].")),
)

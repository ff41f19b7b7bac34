"""What is measured: a mixer in one layer of a small ViT, or a whole model of timm, for a number of tokens."""

import math
from typing import Any, NamedTuple

import timm

from terrazzo.backbones.mixers import mixer_class, mixers
from terrazzo.errors import InputError
from terrazzo.tools.mechanisms import read_mixer
from terrazzo.tools.models import build_on_meta, options_for, require_model

LAYER = dict(embed_dim=64, num_heads=4, depth=1, patch_size=1, in_chans=1)
"""The host of a mixer: one layer of 64 channels and 4 heads, a token for each pixel of a grey image."""


class Subject(NamedTuple):
    """A model for images (1, channels, H, W): its name and options for timm, and the size of the images."""

    model: str
    options: dict[str, Any]
    size: tuple[int, int]
    channels: int


def is_mixer(name: str) -> bool:
    """Whether a name NAME[,KEY=VALUE...] means a mixer."""
    return name.split(",", 1)[0] in mixers()


def check(name: str) -> None:
    """InputError if a name is neither a mixer with valid options nor a model of timm."""
    if is_mixer(name):
        mixer_class(read_mixer("MODEL", name)[0])
        build_on_meta("mixer_vit_tiny", **subject(name, 64).options)
        return
    try:
        require_model(name)
    except InputError as error:
        raise InputError(f"{error}; the mixers are {', '.join(mixers())}") from None


def subject(name: str, length: int) -> Subject:
    """What to build for a number of tokens, on a grid as near to a square as whole numbers allow.

    The tokens of a model of timm are the places of its first map: a plain ViT's patches.
    """
    rows = next(rows for rows in range(math.isqrt(length), 0, -1) if length % rows == 0)
    grid = (rows, length // rows)
    if is_mixer(name):
        mixer, options = read_mixer("MODEL", name)
        given = dict(mixer=mixer, mixer_options=options, grid=grid, num_classes=0, **LAYER)
        return Subject("mixer_vit_tiny", given, grid, LAYER["in_chans"])
    stride = build_on_meta(name, features_only=True).feature_info.reduction()[0]
    size = (stride * grid[0], stride * grid[1])
    return Subject(name, dict(num_classes=0, **options_for(name, size)), size, 3)


def build(found: Subject):
    """The model of a subject, with random weights, in evaluation mode."""
    return timm.create_model(found.model, **found.options).eval()

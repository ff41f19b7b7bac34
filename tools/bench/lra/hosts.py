"""Small hosts of a mixer: the same ViT for all mixers, and the same pyramid for all choices of its stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from terrazzo.backbones.mixers import mixer_class, mixers
from terrazzo.errors import InputError
from terrazzo.tools.bench.lra.tasks import Task
from terrazzo.tools.mechanisms import read_mixer

VIT = dict(embed_dim=64, num_heads=4, depth=4)
PYRAMID = dict(dim=32, head_dim=16, depths=(1, 1, 1, 1))
_STAGES = len(PYRAMID["depths"])


@dataclass(frozen=True)
class Entry:
    """A network that takes part: its name, and a function from a task and a side of patches to the network."""

    name: str
    build: Callable[[Task, int], nn.Module]

    def check(self, task: Task, patch: int) -> None:
        """InputError, with the network's name, if an option of it is wrong; it takes no memory."""
        try:
            with torch.device("meta"):
                self.build(task, patch)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        except Exception:  # it may compute with its weights, which are not there; the real network is tried later
            return


def vit(text: str) -> Entry:
    """The ViT with a mixer NAME[,KEY=VALUE...]. InputError if no mixer has the name."""
    name, options = read_mixer("--mixer", text)
    mixer_class(name)

    def build(task: Task, patch: int) -> nn.Module:
        grid = tuple(-(-side // patch) for side in task.grid)
        given = dict(mixer=name, mixer_options=options, patch_size=patch, grid=grid, **VIT)
        return _network(task, "mixer_vit_tiny", given, (VIT["depth"] - 1,), global_pool="avg")

    return Entry(text, build)


def pyramid(text: str) -> Entry:
    """The pyramid with a mixer for each stage, NAME,NAME,NAME,NAME. InputError if it does not name one for each."""
    stages = tuple(text.split(","))
    if len(stages) != _STAGES:
        raise InputError(f"--stages takes a mixer for each of {_STAGES} stages, NAME,NAME,NAME,NAME, got {text!r}")
    for name in stages:
        mixer_class(name)

    def build(task: Task, patch: int) -> nn.Module:
        if task.sequence:
            raise InputError("a pyramid needs a map, and this task is a sequence")
        return _network(task, "mixer_pyramid_tiny", dict(mixers=stages, **PYRAMID), tuple(range(_STAGES)))

    return Entry("pyramid " + "/".join(stages), build)


def entries(names: Sequence[str], stages: Sequence[str], task: Task) -> list[Entry]:
    """The networks that a command's options name.

    Without options these are the ViT with every mixer, and on maps the pyramid with every mixer in its first two
    stages and softmax attention in its last two.
    """
    if names or stages:
        return list(dict.fromkeys([*map(vit, names), *map(pyramid, stages)]))
    found = [vit(name) for name in mixers()]
    if not task.sequence:
        found += [pyramid(f"{name},{name},softmax,softmax") for name in mixers()]
    return found


def _network(task: Task, name: str, given: dict[str, Any], indices: Sequence[int], **classifier: Any) -> nn.Module:
    given = dict(in_chans=task.channels, **given)
    if not task.dense:
        return timm.create_model(name, num_classes=task.classes, **given, **classifier)
    return _Dense(timm.create_model(name, features_only=True, out_indices=indices, **given), task.classes)


class _Dense(nn.Module):
    """A head for every pixel: levels are projected, summed at the finest stride, and unfolded to pixels."""

    def __init__(self, backbone: nn.Module, classes: int, width: int = 64):
        super().__init__()
        self.backbone = backbone
        self.stride = backbone.feature_info.reduction()[0]
        self.levels = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.pixels = nn.Conv2d(width, classes * self.stride**2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to logits (B, classes, H, W)."""
        height, width = x.shape[2:]
        maps = [level(found) for level, found in zip(self.levels, self.backbone(x))]
        finest = maps[0]
        for found in maps[1:]:
            finest = finest + F.interpolate(found, size=finest.shape[2:], mode="bilinear")
        return F.pixel_shuffle(self.pixels(F.gelu(finest)), self.stride)[..., :height, :width]

"""The trained parts: which tiles a fine pass improves, whether a picture needs one, and how both passes are fused."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from terrazzo.checkpoints.files import load_file
from terrazzo.errors import InputError
from terrazzo.gated_zoom._tiles import Grid

HIDDEN = 64


class RegionHead(nn.Module):
    """Logits of tiles from features of the coarse pass: how much a fine pass would change, or correct.

    Gradients stop at the features.

    Args:
        in_channels: Channels of the features.
        hidden: Channels between the layers.
    """

    def __init__(self, in_channels: int, hidden: int = HIDDEN):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, hidden, 1)
        self.spread = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """From features (B, C, h, w) to logits (B, rows, columns)."""
        x = self.act(self.spread(self.reduce(features.detach())))
        return grid.pool(self.score(x))[:, 0]


class Gate(nn.Module):
    """The logit that a fine pass would change more of a picture than a small share of its pixels.

    Gradients stop at the features.

    Args:
        in_channels: Channels of the features.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.score = nn.Linear(2 * in_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """From features (B, C, h, w) to logits (B,)."""
        features = features.detach()
        return self.score(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))[:, 0]


class Refinement(nn.Module):
    """Corrects fused logits by a 3 x 3 convolution on both passes and on where tiles lie.

    The correction fades out with the ramp of the halos, so logits away from the tiles stay as they are. It starts at 0.

    Args:
        classes: Channels of the logits.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.mix = nn.Conv2d(2 * classes + 1, classes, 3, padding=1)
        for parameter in self.mix.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarse: Tensor, fused: Tensor, ramp: Tensor) -> Tensor:
        """The corrected logits of a picture, (classes, H, W).

        Args:
            coarse: (classes, H, W), of the coarse pass.
            fused: (classes, H, W): logits of the fine pass in the tiles, of the coarse pass away from them.
            ramp: (1, H, W), from 1 in the tiles to 0 at the end of the halos.

        Raises:
            InputError: The logits have another number of classes.
        """
        if len(coarse) != self.classes:
            raise InputError(f"the refinement was trained for {self.classes} classes, and the model has {len(coarse)}")
        return fused + ramp * self.mix(torch.cat([coarse, fused, ramp])[None])[0]


class Heads(nn.Module):
    """Region head, gate and refinement, with what they were trained for; the state dict has all of it.

    Args:
        in_channels: Channels of the features.
        scale, tile, budget: What the heads are trained for.
        classes: Channels of a segmentor's logits; None for heads without a refinement.

    Attributes:
        region: The `RegionHead`.
        gate: The `Gate`.
        refine: The `Refinement`, or None.
        settings: `scale`, `tile` and `budget` as numbers.
        trained: Whether region head, gate and refinement are trained.
        thresholds: Of region head and gate, as probabilities, chosen for the budget.
    """

    settings: Tensor
    trained: Tensor
    thresholds: Tensor

    def __init__(
        self, in_channels: int, scale: float = 4, tile: int = 192, budget: float = 0.25, classes: int | None = None
    ):
        super().__init__()
        self.region, self.gate = RegionHead(in_channels), Gate(in_channels)
        self.refine = None if classes is None else Refinement(classes)
        self.register_buffer("settings", torch.tensor([float(scale), float(tile), float(budget)]))
        self.register_buffer("trained", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("thresholds", torch.tensor([1.0, 0.0]))


def load_heads(place: str | os.PathLike) -> Heads:
    """The heads of a file that their training wrote.

    Raises:
        InputError: The file cannot be read, or has no heads.
    """
    saved = load_file(place, "cpu")
    state: Any = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    own = {key.removeprefix("heads."): value for key, value in state.items() if key.startswith("heads.")}
    weight = own.get("region.reduce.weight")
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise InputError(
            f"{os.fspath(place)} has no heads of a zoom; name the heads.pth that a training of a zoom config wrote"
        )
    mix = own.get("refine.mix.weight")
    heads = Heads(weight.shape[1], classes=len(mix) if isinstance(mix, Tensor) and mix.dim() else None)
    try:
        heads.load_state_dict(own)
    except RuntimeError as error:
        raise InputError(f"{os.fspath(place)} has heads of another version of terrazzo; train them again") from error
    return heads.eval()

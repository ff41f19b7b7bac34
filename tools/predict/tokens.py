"""Draws which tokens a reducing ViT merged and dropped, on the picture as the ViT saw it."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import Normalize

from terrazzo.backbones._tokens import Reducer
from terrazzo.errors import InputError
from terrazzo.tools.predict.classifiers import Engine
from terrazzo.tools.predict.draw import outlines, panels

_SIDE = 448  # pixels of a panel's shorter side, at least
_DROPPED = 0.25  # brightness of a dropped patch
_LINE = (250, 250, 250)


class Stage(NamedTuple):
    """What was left in front of a block.

    Attributes:
        block: counted from 0.
        tokens: number of patch tokens that are left.
        of: (H, W), for each patch the number of its token, -1 if it was dropped.
    """

    block: int
    tokens: int
    of: np.ndarray


class TokenWatch:
    """Remembers the images that reach a predictor's reducing ViT, and finds what the ViT does with their tokens.

    Raises:
        InputError: the predictor's model has no reducing ViT.
    """

    def __init__(self, predictor: Engine):
        found = [
            module for module in predictor.model.modules() if isinstance(getattr(module, "reducer", None), Reducer)
        ]
        if not found:
            raise InputError(
                "the model merges and drops no tokens, so there is nothing to show; "
                "MCTF and AS-ViT do: see terrazzo list 'mctf*' and 'asvit*'"
            )
        self.mean, self.std = _normalised_by(predictor)
        self.host = found[0]
        self.images: torch.Tensor | None = None
        patches = self.host.stem if hasattr(self.host, "stem") else self.host.patch_embed
        patches.register_forward_pre_hook(self._seen)

    def _seen(self, module: nn.Module, arguments: tuple) -> None:
        self.images = arguments[0]

    @torch.inference_mode()
    def stages(self) -> list[Stage]:
        """The stages of the first image in the last batch; the first stage has all tokens."""
        images, found = self.images[:1], []

        def note(reducer: Reducer, arguments: tuple, output: torch.Tensor) -> None:
            state = arguments[2]
            tokens = reducer.assignment(state)
            if tokens is None:
                of = np.arange(state.grid[0] * state.grid[1])
            else:
                of = tokens[0, state.prefix :].cpu().numpy()
            stage = Stage(state.depth, len(np.unique(of[of >= 0])), of.reshape(state.grid))
            if not found or stage.tokens != found[-1].tokens:
                found.append(stage)

        hook = self.host.reducer.register_forward_hook(note)
        try:
            self.host.forward_intermediates(images, intermediates_only=True)
        finally:
            hook.remove()
        return found

    def draw(self) -> Image.Image:
        """A panel for every stage: patches of one token share a colour and an outline; dropped patches are dark."""
        stages = self.stages()
        pixels = self.images[0].float().cpu().permute(1, 2, 0).numpy() * self.std + self.mean
        drawn = [_panel(pixels.clip(0, 1), stage.of) for stage in stages]
        total = stages[0].of.size
        titles = [f"block {stage.block}: {stage.tokens} tokens for {total} patches" for stage in stages]
        return panels(drawn, titles)


def _normalised_by(predictor: Engine) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, three colours each, that normalised a model's colours of 0 to 1."""
    prepare = getattr(predictor.model, "data_preprocessor", None)
    if prepare is not None:  # OpenMMLab's, for colours of 0 to 255
        found = (getattr(prepare, "mean", torch.zeros(3)) / 255, getattr(prepare, "std", torch.full((3,), 255.0)) / 255)
    else:
        steps = [step for step in predictor.transform.transforms if isinstance(step, Normalize)]
        found = (steps[-1].mean, steps[-1].std) if steps else (torch.zeros(3), torch.ones(3))
    mean, std = (torch.as_tensor(x).float().flatten().cpu().numpy() for x in found)
    return mean, std


def _panel(pixels: np.ndarray, of: np.ndarray) -> Image.Image:
    """The picture (h, w, 3), 0 to 1, under the tokens of its patches."""
    scale = -(-_SIDE // min(pixels.shape[:2]))
    canvas = pixels.repeat(scale, 0).repeat(scale, 1)
    rows, columns = (
        np.minimum(np.arange(side) * count // side, count - 1) for side, count in zip(canvas.shape[:2], of.shape)
    )
    labels = of[np.ix_(rows, columns)]
    kept = labels >= 0
    counts = np.bincount(labels[kept])
    members = np.bincount(of[of >= 0])
    means = np.stack([np.bincount(labels[kept], canvas[kept][:, i]) / counts.clip(1) for i in range(3)], 1)
    merged = kept & (members[labels] > 1)
    canvas[merged] = means[labels[merged]]
    canvas[~kept] *= _DROPPED
    canvas = (255 * canvas).round().astype(np.uint8)
    canvas[outlines(labels)] = _LINE
    return Image.fromarray(canvas)

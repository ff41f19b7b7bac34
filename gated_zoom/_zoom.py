"""The gated zoom of a segmentor: coarse pass, gate, choice of tiles, fine pass, fusion."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from terrazzo.errors import InputError
from terrazzo.gated_zoom._fusion import enlarged, fuse, reduced
from terrazzo.gated_zoom._heads import Heads, load_heads
from terrazzo.gated_zoom._passes import Passes, is_detector
from terrazzo.gated_zoom._scores import UNTRAINED, tile_scores
from terrazzo.gated_zoom._tiles import Grid


@dataclass(frozen=True)
class Coarse:
    """What the coarse pass says about a batch.

    Attributes:
        result: Logits (B, classes, h, w) of the reduced images; for a detector the `Boxes` of each picture.
        scores: (B, rows, columns), of the tiles; the highest scores are looked at first.
        gates: (B,), the probability that a picture needs a fine pass; None without a trained gate.
        pixels: Pixels of a reduced image.
    """

    result: Any
    scores: Tensor
    gates: Tensor | None
    pixels: int


@dataclass(frozen=True)
class Look:
    """A batch after the zoom.

    Attributes:
        result: Logits (B, classes, H, W); for a detector the `Boxes` of each picture.
        coarse: The coarse pass.
        tiles: For each picture the chosen tiles.
        grid: Where the tiles are.
        gated: For each picture whether the gate spared the fine pass.
    """

    result: Any
    coarse: Coarse
    tiles: Sequence[Sequence[int]]
    grid: Grid
    gated: Sequence[bool]

    @property
    def megapixels(self) -> list[float]:
        """For each picture the pixels that the model saw, in millions: the reduced image and all crops with halos."""
        return [megapixels(self.coarse.pixels, self.grid, len(chosen)) for chosen in self.tiles]


def megapixels(coarse: int, grid: Grid, tiles: int) -> float:
    """Pixels of a coarse pass and of the crops of some tiles, in millions."""
    height, width = grid.crop_size
    return (coarse + tiles * height * width) / 1e6


class Zoom(nn.Module):
    """A segmentor that looks twice where it pays; see `terrazzo.zoom`, which makes it.

    A subclass for other models replaces `kind`, `untrained` and the methods that know what a result is.

    Attributes:
        passes: The model.
        heads: The trained heads, or None.
        scale, tile, halo, budget, gate, region, score, refine, stride, batch: As in `terrazzo.zoom`.
        on_look: Is called with each `Look`; None for nothing.
    """

    kind: type[Passes] = Passes
    untrained: tuple[str, ...] = tuple(UNTRAINED)
    """Scores of tiles that need no training; the first is the default without heads."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        scale: float = 4,
        tile: int = 192,
        halo: int = 32,
        budget: float = 0.25,
        gate: float | str = 0.05,
        *,
        region: float | str | None = None,
        megapixels: float | None = None,
        heads: Heads | str | os.PathLike | None = None,
        score: str | None = None,
        refine: bool = False,
        features: str | None = None,
        stride: int = 32,
        batch: int = 8,
    ):
        super().__init__()
        _check_sizes(scale, tile, halo, stride, batch)
        if not 0 <= budget <= 1:
            raise InputError(f"budget is {budget}; it is a share of the tiles, from 0 to 1")
        if megapixels is not None and not megapixels > 0:
            raise InputError(f"megapixels is {megapixels}; it must be more than 0")
        self.passes = self.kind(model, features)
        self.heads = load_heads(heads) if isinstance(heads, (str, os.PathLike)) else heads
        weights = next(self.passes.parameters(), None)
        if self.heads is not None and weights is not None:
            self.heads.to(weights.device)
        self.scale, self.tile, self.halo, self.stride, self.batch = scale, tile, halo, stride, batch
        self.budget, self.megapixels = budget, megapixels
        self.score = self._checked_score(score)
        self.gate = self._threshold("gate", gate)
        self.region = None if region is None else self._threshold("region", region)
        self._check_heads()
        self.refine = refine
        self._check_refinement()
        self.on_look: Callable[[Look], None] | None = None

    def grid(self, images: Tensor) -> Grid:
        """The tiles of images (B, 3, H, W)."""
        return Grid(images.shape[2], images.shape[3], self.tile, self.halo, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W), prepared as for the model, to logits (B, classes, H, W)."""
        return self.look(images).result

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """As `forward`, with what was seen on the way."""
        grid, coarse = self.grid(images), self.coarse(images)
        gated = self.gated_off(coarse)
        chosen = [[] if off else self.choose(scores, grid, coarse.pixels) for off, scores in zip(gated, coarse.scores)]
        result = self.united(coarse.result, self.fine(images, grid, chosen), grid, chosen)
        found = Look(result, coarse, chosen, grid, gated)
        if self.on_look is not None:
            self.on_look(found)
        return found

    @torch.no_grad()
    def coarse(self, images: Tensor) -> Coarse:
        """The coarse pass over images (B, 3, H, W), with scores of tiles and the gate."""
        small, grid, heads = reduced(images, self.scale), self.grid(images), self.heads
        scores = gates = None
        if heads is not None and (self.score == "region" or heads.trained[1]):
            result, features = self.passes.with_features(small)
            if features is None:
                raise InputError(
                    "heads need features, and the model has no module 'backbone': name one as features=NAME"
                )
            if heads.trained[1]:
                gates = heads.gate(features).sigmoid()
            if self.score == "region":
                scores = heads.region(features, grid).sigmoid()
        else:
            result = self.passes(small)
        result = self.in_place(result, small, images)
        if scores is None:
            scores = self.untrained_scores(result, grid)
        return Coarse(result, scores, gates, small.shape[2] * small.shape[3])

    def gated_off(self, coarse: Coarse) -> list[bool]:
        """For each picture whether the gate spares the fine pass."""
        if self.gate >= 1:
            return [True] * len(coarse.scores)
        if coarse.gates is None:
            return [False] * len(coarse.scores)
        return (coarse.gates < self.gate).tolist()

    def choose(self, scores: Tensor, grid: Grid, coarse_pixels: int) -> list[int]:
        """The tiles of a picture that get a fine pass, in the order of their numbers.

        Args:
            scores: (rows, columns).
            grid: The tiles.
            coarse_pixels: Pixels of the coarse pass, which count for `megapixels`.
        """
        most = tiles_within(self.budget, grid)
        if self.megapixels is not None:
            height, width = grid.crop_size
            most = min(grid.count, max(0, int((1e6 * self.megapixels - coarse_pixels) / (height * width))))
        found = scores.flatten().topk(most)
        kept = found.indices if self.region is None else found.indices[found.values > self.region]
        return sorted(kept.tolist())

    @torch.no_grad()
    def fine(self, images: Tensor, grid: Grid, chosen: Sequence[Sequence[int]]) -> list[list[Any]]:
        """For each picture the logits (classes, h, w), or `Boxes`, of the crops of its chosen tiles."""
        places = [(number, index) for number, tiles in enumerate(chosen) for index in tiles]
        crops = [images[(number, slice(None), *grid.crop(index).slices)] for number, index in places]
        found = (
            y for at in range(0, len(crops), self.batch) for y in self.passes(torch.stack(crops[at:][: self.batch]))
        )
        return [list(itertools.islice(found, len(tiles))) for tiles in chosen]

    def install(self) -> nn.Module:
        """Make a model of OpenMMLab predict with this zoom, in place; the model is returned.

        Its `test_step`, metrics and drawings stay as they are. `test_cfg.mode="slide"` of a segmentor no longer counts.

        Raises:
            InputError: The model is of another kind.
        """
        if not self.passes.is_segmentor:
            raise InputError(
                f"install is for models of mmsegmentation and mmdetection, not for a {type(self.passes.model).__name__}"
            )
        self.passes.model.inference = lambda inputs, metas: self(inputs)
        return self.passes.model

    def in_place(self, result: Any, small: Tensor, images: Tensor) -> Any:
        """The result of the coarse pass with the places of the picture, where its places matter."""
        return result

    def full_size(self, result: Any, grid: Grid) -> Any:
        """The result of the coarse pass in the picture's size."""
        return enlarged(result, (grid.height, grid.width))

    def untrained_scores(self, result: Any, grid: Grid, name: str | None = None) -> Tensor:
        """Scores of tiles without a region head, (B, rows, columns); by default by `score`."""
        return tile_scores(name or self.score, result, grid)

    def united(self, coarse: Any, fine: Sequence[Sequence[Any]], grid: Grid, chosen: Sequence[Sequence[int]]) -> Any:
        """The results of both passes as one."""
        refinement = self.heads.refine if self.refine and self.heads is not None else None
        logits = self.full_size(coarse, grid)
        return torch.stack([fuse(y, crops, grid, tiles, refinement) for y, crops, tiles in zip(logits, fine, chosen)])

    def predictions(self, result: Any, samples: Sequence[Any]) -> Any:
        """The data samples of OpenMMLab with a result, in the pictures' own size."""
        return self.passes.model.postprocess_result(result, samples)

    def _checked_score(self, name: str | None) -> str:
        trained = self.heads is not None and bool(self.heads.trained[0])
        known = ("region", *self.untrained, "random")
        if name is None:
            return "region" if trained else self.untrained[0]
        if name not in known:
            raise InputError(f"score is {name!r}; choose one of {', '.join(known)}")
        if name == "region" and not trained:
            raise InputError("score='region' needs a trained region head: pass heads=FILE")
        return name

    def _threshold(self, name: str, value: float | str) -> float:
        if value == "stored":
            if self.heads is None:
                raise InputError(f"{name}='stored' takes the threshold from the heads' file: pass heads=FILE")
            if name == "region" and self.score != "region":
                raise InputError(
                    "region='stored' is the threshold of the region head: leave score out, or give a number"
                )
            return float(self.heads.thresholds[1 if name == "gate" else 0])
        if isinstance(value, str) or not 0 <= value <= 1:
            raise InputError(f"{name} is {value!r}; give a probability from 0 to 1, or 'stored'")
        return float(value)

    def _check_refinement(self) -> None:
        """A refinement must be trained."""
        if self.refine and (self.heads is None or self.heads.refine is None or not self.heads.trained[2]):
            raise InputError(
                "refine=True needs a trained refinement: pass heads=FILE of a training with stage='refine'"
            )

    def _check_heads(self) -> None:
        """Heads answer for the scale and the tiles that they were trained for."""
        if self.heads is None:
            return
        for name, own, wanted in zip(("scale", "tile"), (self.scale, self.tile), self.heads.settings.tolist()):
            if not math.isclose(own, wanted, rel_tol=1e-6):  # the file has float32
                raise InputError(f"the heads were trained for {name} {wanted:g}, not {own:g}; pass {name}={wanted:g}")


def tiles_within(budget: float, grid: Grid) -> int:
    """The number of tiles that a share of all tiles allows, rounded down."""
    return int(budget * grid.count + 1e-9)


def zoom(
    model: Callable[[Tensor], Any],
    scale: float = 4,
    tile: int = 192,
    halo: int = 32,
    budget: float = 0.25,
    gate: float | str = 0.05,
    **options: Any,
) -> Zoom:
    """Make a segmentor or a detector look at a reduced image first, and again at full size where that pays.

        zoomed = terrazzo.zoom(model.eval(), scale=4, tile=192, budget=0.25)
        logits = zoomed(images)

    A coarse pass over the image with 1 / scale of its sides always gives an answer. If the gate does not spare it, a
    fine pass looks at the tiles with the highest scores, and both are fused. The model should be trained at both
    scales. Without trained heads, tiles are scored by how unsure the coarse pass is, and nothing is gated off.

    Source: Q-Zoom, arXiv 2604.06912, whose two passes answer questions about images. The form for dense prediction,
    with tiles in place of one box, is terrazzo's own.

    Args:
        model: A segmentor of mmsegmentation, a detector of mmdetection without masks, or a callable from images to
            logits (B, classes, H, W).
        scale: How many times smaller the sides of the coarse image are.
        tile: Side of a tile in pixels of the full image, a multiple of the stride.
        halo: Pixels around a tile that the model sees, too; a multiple of the stride. If the model's receptive field
            reaches at most `halo` pixels from a pixel, logits in a tile are those of the whole image.
        budget: Largest share of the tiles of a picture that get a fine pass, 0 to 1, rounded down to whole tiles.
        gate: A picture gets no fine pass if the trained gate's probability is below; 1 spares all fine passes, and
            "stored" takes the threshold that was chosen at the end of the gate's training.
        **options: `megapixels`: largest number of pixels that the model sees for a picture, in millions, coarse pass
            included, in place of `budget`. `region`: a tile gets a fine pass only if its score is higher; "stored" as
            for `gate`. `heads`: trained heads, or their file. `score`: "region" (with trained heads, the default),
            "entropy" (the default without heads), "margin" or "random"; for detectors "uncertainty" (the default
            without heads), "region" or "random". `refine`: correct the fused logits of a segmentor by the trained
            refinement of `heads`, a 3 x 3 convolution; False by default. `features`: the module whose output the heads
            see, "backbone" by default. `stride`: the model's stride, 32 by default; 1 if places do not matter to it.
            `batch`: crops that run together, 8 by default.

    Returns:
        A module from images (B, 3, H, W) to logits (B, classes, H, W), or to the `Boxes` of each image for a detector,
        without gradients. `look` also gives tiles, scores and megapixels.

    Raises:
        InputError: A value is out of its range, tile or halo are no multiples of the stride, or heads do not fit.
    """
    kind = Zoom
    if is_detector(model):
        from terrazzo.gated_zoom._detector import ZoomDetector as kind  # only here: it is a subclass of Zoom
    return kind(model, scale, tile, halo, budget, gate, **options)


def _check_sizes(scale: float, tile: int, halo: int, stride: int, batch: int) -> None:
    if not scale >= 1:
        raise InputError(f"scale is {scale}; it must be at least 1")
    if min(tile, stride, batch) < 1 or halo < 0:
        raise InputError(
            f"tile {tile}, stride {stride} and batch {batch} must be at least 1, and halo {halo} at least 0"
        )
    for name, value in (("tile", tile), ("halo", halo)):
        if value % stride:
            raise InputError(
                f"{name} is {value}; it must be a multiple of the model's stride, {stride}, such as "
                f"{-(-value // stride) * stride}; pass stride=N if the model has another stride"
            )
